//! What bad cameras and bad coders do to a picture.

use image::codecs::jpeg::JpegEncoder;
use image::{ExtendedColorType, ImageFormat};

use crate::{Error, Result};

/// Buffers of [`blur`].
#[derive(Debug, Default)]
pub(super) struct BlurScratch {
    padded: Vec<u8>,
    sum: Vec<u16>,
    rows: Vec<u8>,
}

/// Gaussian blur of side x side x 3 bytes, cut at 3 sigma, borders repeated.
pub(super) fn blur(pixels: &mut [u8], side: usize, sigma: f32, scratch: &mut BlurScratch) {
    let radius = (3.0 * sigma).ceil() as usize;
    let weights = gaussian(radius, sigma);
    let line = side * 3;
    let BlurScratch { padded, sum, rows } = scratch;
    sum.resize(line, 0);
    rows.clear();
    for row in pixels.chunks_exact(line) {
        padded.clear();
        (0..radius).for_each(|_| padded.extend_from_slice(&row[..3]));
        padded.extend_from_slice(row);
        (0..radius).for_each(|_| padded.extend_from_slice(&row[line - 3..]));
        sum.fill(128); // rounds
        for (k, &w) in weights.iter().enumerate() {
            add(sum, &padded[k * 3..][..line], w);
        }
        rows.extend(sum.iter().map(|&v| (v >> 8) as u8));
    }
    for (y, row) in pixels.chunks_exact_mut(line).enumerate() {
        sum.fill(128);
        for (k, &w) in weights.iter().enumerate() {
            let from = (y + k).saturating_sub(radius).min(side - 1);
            add(sum, &rows[from * line..][..line], w);
        }
        row.iter_mut().zip(sum.iter()).for_each(|(out, &v)| *out = (v >> 8) as u8);
    }
}

fn add(sum: &mut [u16], values: &[u8], weight: u16) {
    sum.iter_mut().zip(values).for_each(|(sum, &v)| *sum += u16::from(v) * weight);
}

/// 2 radius + 1 weights with sum 256, so that sums of bytes fit 16 bits with room to round. What
/// rounding leaves over goes to the centre, which keeps the kernel symmetric.
fn gaussian(radius: usize, sigma: f32) -> Vec<u16> {
    let value = |k: usize| {
        let t = (k as f32 - radius as f32) / sigma;
        (-0.5 * t * t).exp()
    };
    let total: f32 = (0..=2 * radius).map(value).sum();
    let mut weights: Vec<u16> = (0..=2 * radius).map(|k| (value(k) / total * 256.0).round() as u16).collect();
    let others: u16 = weights.iter().enumerate().filter(|(k, _)| *k != radius).map(|(_, w)| w).sum();
    weights[radius] = 256 - others;
    weights
}

/// Codes side x side x 3 bytes as JPEG of a quality and back.
pub(super) fn jpeg(pixels: &mut [u8], side: usize, quality: u8) -> Result<()> {
    let bug = |what: String| Error::Internal(format!("JPEG noise: {what}"));
    let mut file = Vec::new();
    let size = u32::try_from(side).map_err(|_| bug(format!("side {side}")))?;
    JpegEncoder::new_with_quality(&mut file, quality)
        .encode(pixels, size, size, ExtendedColorType::Rgb8)
        .map_err(|e| bug(e.to_string()))?;
    let decoded =
        image::load_from_memory_with_format(&file, ImageFormat::Jpeg).map_err(|e| bug(e.to_string()))?;
    let decoded = decoded.into_rgb8();
    if decoded.len() != pixels.len() {
        return Err(bug("the size changed".into()));
    }
    pixels.copy_from_slice(&decoded);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaussian_weights_are_symmetric_and_sum_to_one() {
        for sigma in [0.05, 0.4, 1.0, 1.5, 5.0] {
            let weights = gaussian((3.0f32 * sigma).ceil() as usize, sigma);
            assert_eq!(weights.iter().sum::<u16>(), 256, "{sigma}");
            assert!(weights.iter().eq(weights.iter().rev()), "{sigma}");
            assert!(weights.iter().max() == Some(&weights[weights.len() / 2]), "{sigma}: {weights:?}");
        }
    }

    #[test]
    fn blur_keeps_flat_colours_and_spreads_a_point() {
        let side = 15;
        let mut flat: Vec<u8> = [9, 255, 130].repeat(side * side);
        blur(&mut flat, side, 1.5, &mut BlurScratch::default());
        assert_eq!(flat, [9, 255, 130].repeat(side * side));

        let mut point = vec![0; side * side * 3];
        let at = |x: usize, y: usize| (y * side + x) * 3 + 1;
        point[at(7, 7)] = 255;
        blur(&mut point, side, 1.0, &mut BlurScratch::default());
        // The centre of a Gaussian of sigma 1 is 1 / (2 pi).
        assert!((point[at(7, 7)] as f32 - 255.0 / std::f32::consts::TAU).abs() < 2.0);
        assert_eq!(point[at(6, 7)], point[at(8, 7)]);
        assert_eq!(point[at(7, 6)], point[at(6, 7)]);
        assert!(point[at(6, 7)] < point[at(7, 7)] && point[at(6, 7)] > 15);
        assert!(point.iter().step_by(3).all(|&red| red == 0));
    }

    #[test]
    fn jpeg_noise_is_worse_at_lower_quality() {
        let side = 32;
        let picture: Vec<u8> = (0..side * side * 3).map(|i| (i * i % 251) as u8).collect();
        let error = |quality| {
            let mut noisy = picture.clone();
            jpeg(&mut noisy, side, quality).unwrap();
            picture.iter().zip(&noisy).map(|(&a, &b)| u64::from(a.abs_diff(b))).sum::<u64>()
        };
        assert!(error(5) > error(95) && error(95) > 0);
    }
}
