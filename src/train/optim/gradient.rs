//! Size and sanity of gradients.

/// Lanes of the sums: enough that they fill vector registers.
const LANES: usize = 16;

/// Euclidean norm of all values of all tensors together. Sums in f64, in an order that depends on the
/// lengths alone.
pub fn global_norm<S: AsRef<[f32]>>(tensors: &[S]) -> f64 {
    tensors.iter().map(|t| squares(t.as_ref())).sum::<f64>().sqrt()
}

fn squares(values: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for k in 0..LANES {
            lanes[k] += f64::from(block[k]) * f64::from(block[k]);
        }
    }
    lanes.iter().sum::<f64>() + rest.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>()
}

/// What gradients of this norm are scaled by so that it is at most `max_norm`; None where they are not.
pub fn clip_factor(norm: f64, max_norm: f32) -> Option<f32> {
    let factor = (f64::from(max_norm) / (norm + 1e-6)) as f32;
    (norm.is_finite() && factor < 1.0).then_some(factor)
}

/// Scales all gradients by one factor so that their global norm is at most `max_norm`
/// (`torch.nn.utils.clip_grad_norm_`), and returns the norm before. Gradients whose norm is not finite
/// are left as they are: look at the return value, and skip the step.
pub fn clip_global_norm(gradients: &mut [&mut [f32]], max_norm: f32) -> f64 {
    let norm = global_norm(gradients);
    if let Some(factor) = clip_factor(norm, max_norm) {
        for g in gradients.iter_mut().flat_map(|t| t.iter_mut()) {
            *g *= factor;
        }
    }
    norm
}

/// Tensor and index of the first value that is not finite, None where all are.
pub fn first_non_finite<S: AsRef<[f32]>>(tensors: &[S]) -> Option<(usize, usize)> {
    tensors.iter().enumerate().find_map(|(t, values)| {
        let values = values.as_ref();
        // A sum of products with 0 is 0, or NaN where any value is not finite: no branch a value.
        let mut lanes = [0f32; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for k in 0..LANES {
                lanes[k] += block[k] * 0.0;
            }
        }
        if lanes.iter().chain(rest).all(|v| v.is_finite()) {
            return None;
        }
        values.iter().position(|v| !v.is_finite()).map(|i| (t, i))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clipping_scales_all_tensors_to_the_norm_and_returns_the_old_one() {
        let (mut a, mut b) = ([3.0f32, 0.0], vec![4.0f32; 1]);
        assert!((clip_global_norm(&mut [&mut a, &mut b], 10.0) - 5.0).abs() < 1e-9);
        assert_eq!((a, b[0]), ([3.0, 0.0], 4.0), "below the limit nothing changes");
        assert!((clip_global_norm(&mut [&mut a, &mut b], 1.0) - 5.0).abs() < 1e-9);
        assert!((a[0] - 0.6).abs() < 1e-6 && (b[0] - 0.8).abs() < 1e-6);
        let mut long = vec![1e30f32; 100];
        assert!((clip_global_norm(&mut [&mut long], 1.0) - 1e31).abs() < 1e25, "no overflow in f64");
        assert!((global_norm(&[&long]) - 1.0).abs() < 1e-5);
    }

    #[test]
    fn values_that_are_not_finite_are_found_and_left_alone() {
        for (len, at) in [(1, 0), (16, 15), (40, 3), (40, 39)] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut g = vec![2.0f32; len];
                assert_eq!(first_non_finite(&[&g, &g]), None);
                g[at] = bad;
                assert_eq!(first_non_finite(&[vec![f32::MAX; 64], g.clone()]), Some((1, at)));
                assert!(!clip_global_norm(&mut [&mut g], 1.0).is_finite());
                assert!(len == 1 || g.iter().filter(|v| **v == 2.0).count() == len - 1);
            }
        }
    }
}
