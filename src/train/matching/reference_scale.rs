//! Which group a proposal of any size belongs to.

/// The reference scale of a w x h proposal in Grouped Fast R-CNN: the index of the scale s with the
/// least |log2(sqrt(w h) / s)| (Group Sampling Eq. 4; the paper's scales are 16, 32, 64, 128). The
/// first of equal ones; the smallest scale's for an empty box. Panics without scales.
pub fn reference_scale(w: f32, h: f32, scales: &[f32]) -> usize {
    assert!(!scales.is_empty(), "there must be a scale to refer to");
    let side = (w.max(0.0) * h.max(0.0)).sqrt().max(f32::MIN_POSITIVE);
    let distance = |s: f32| (side / s).log2().abs();
    (0..scales.len()).fold(0, |best, k| if distance(scales[k]) < distance(scales[best]) { k } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proposals_go_to_the_nearest_scale_in_octaves() {
        let scales = [16.0, 32.0, 64.0, 128.0];
        let group = |w, h| reference_scale(w, h, &scales);
        assert_eq!(
            [group(16.0, 16.0), group(22.0, 22.0), group(23.0, 23.0), group(16.0, 64.0)],
            [0, 0, 1, 1]
        );
        assert_eq!([group(1e6, 1e6), group(0.0, 5.0)], [3, 0]);
    }
}
