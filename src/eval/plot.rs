//! Precision-recall and ROC curves as SVG; pages of panels in [`page`].

pub mod page;

use std::ops::Range;

use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::curve::{PrCurve, RocCurve};
use crate::{Error, Result};

/// Size of a picture in SVG units (pixels at scale 1).
const SIZE: (u32, u32) = (880, 620);

/// Lengths of the dashes of curves whose colour was used before.
const DASH: i32 = 7;
const GAP: i32 = 4;

const FONT: &str = "Helvetica, Arial, sans-serif";
/// Of axes and their numbers, and of the lines behind the curves.
const GREY: RGBColor = RGBColor(90, 90, 90);
const GRID: RGBColor = RGBColor(225, 225, 225);

/// Told apart by colour-blind readers too (Okabe and Ito, 2008); black comes last.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(150, 140, 20),
    RGBColor(0, 0, 0),
];

/// A named list of (x, y), drawn in order.
struct Series {
    label: String,
    points: Vec<(f64, f64)>,
}

/// Axes of a picture.
struct Axes<'a> {
    title: &'a str,
    x: (&'a str, Range<f64>),
    y: (&'a str, Range<f64>),
    /// Decimals of the numbers along x.
    x_decimals: usize,
    /// The corner that the curves leave free.
    legend: SeriesLabelPosition,
}

/// Precision against recall, both 0 to 1; the legend names each curve with its AP, best first.
pub fn precision_recall_svg(title: &str, curves: &[(&str, &PrCurve)]) -> Result<String> {
    let mut sorted = curves.to_vec();
    sorted.sort_by(|a, b| b.1.ap.total_cmp(&a.1.ap));
    let series = sorted.into_iter().map(|(name, curve)| Series {
        label: format!("{name}  AP {:.3}", curve.ap),
        // Points without any proposal say nothing; they would draw a line up from the origin.
        points: curve.points.iter().filter(|p| p.recall > 0.0).map(|p| (p.recall, p.precision)).collect(),
    });
    let axes = Axes {
        title,
        x: ("Recall", 0.0..1.0),
        y: ("Precision", 0.0..1.0),
        x_decimals: 1,
        legend: SeriesLabelPosition::LowerLeft,
    };
    draw(&axes, series.collect())
}

/// True-positive rate against false positives up to `max_false_positives`; the legend names each
/// curve with its rate there, best first.
pub fn roc_svg(title: &str, curves: &[(&str, &RocCurve)], max_false_positives: usize) -> Result<String> {
    let end = max_false_positives.max(1);
    let mut sorted: Vec<(f64, &str, &RocCurve)> =
        curves.iter().map(|&(name, curve)| (curve.rate_at(end), name, curve)).collect();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
    let series = sorted.into_iter().map(|(rate, name, curve)| Series {
        label: format!("{name}  {rate:.3}"),
        points: curve
            .points
            .iter()
            .filter(|p| p.false_positives <= end as f64)
            .map(|p| (p.false_positives, p.true_positive_rate))
            .collect(),
    });
    let axes = Axes {
        title,
        x: ("False positives", 0.0..end as f64),
        y: ("True-positive rate", 0.0..1.0),
        x_decimals: 0,
        legend: SeriesLabelPosition::LowerRight,
    };
    draw(&axes, series.collect())
}

fn draw(axes: &Axes, series: Vec<Series>) -> Result<String> {
    let mut svg = String::new();
    draw_into(&mut svg, axes, series).map_err(|e| Error::Internal(format!("plot {:?}: {e}", axes.title)))?;
    Ok(svg)
}

fn draw_into(
    svg: &mut String,
    axes: &Axes,
    series: Vec<Series>,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(18)
        .margin_right(28)
        .caption(axes.title, (FONT, 22))
        .x_label_area_size(52)
        .y_label_area_size(64)
        .build_cartesian_2d(axes.x.1.clone(), axes.y.1.clone())?;
    let decimals = axes.x_decimals;
    let number = |v: &f64| format!("{v:.decimals$}");
    chart
        .configure_mesh()
        .x_desc(axes.x.0)
        .y_desc(axes.y.0)
        .x_labels(11)
        .y_labels(11)
        .max_light_lines(0)
        .bold_line_style(GRID)
        .axis_style(GREY)
        .label_style((FONT, 14, &GREY))
        .axis_desc_style((FONT, 16))
        .x_label_formatter(&number)
        .y_label_formatter(&|v| format!("{v:.1}"))
        .draw()?;
    for (i, s) in series.into_iter().enumerate() {
        let style = COLOURS[i % COLOURS.len()].stroke_width(2);
        let points = simplified(s.points, [(&axes.x.1, SIZE.0), (&axes.y.1, SIZE.1)]);
        if i < COLOURS.len() {
            chart
                .draw_series(LineSeries::new(points, style))?
                .label(s.label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 24, y)], style));
        } else {
            chart
                .draw_series(DashedLineSeries::new(points, DASH, GAP, style))?
                .label(s.label)
                .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 24, y)], DASH, GAP, style));
        }
    }
    chart
        .configure_series_labels()
        .position(axes.legend.clone())
        .margin(14)
        .legend_area_size(32)
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(200, 200, 200))
        .label_font((FONT, 14))
        .draw()?;
    root.present()?;
    Ok(())
}

/// Drops points that fall on the pixel of the one kept before; published ROCs have tens of thousands. `axes`: range and
/// pixels of x and y.
fn simplified(points: Vec<(f64, f64)>, axes: [(&Range<f64>, u32); 2]) -> Vec<(f64, f64)> {
    let [x, y] = axes.map(|(range, pixels)| f64::from(pixels) / (range.end - range.start));
    let mut kept: Vec<(f64, f64)> = Vec::new();
    let n = points.len();
    for (i, p) in points.into_iter().enumerate() {
        let far = |k: &(f64, f64)| (p.0 - k.0).abs() * x > 0.5 || (p.1 - k.1).abs() * y > 0.5;
        if kept.last().is_none_or(far) || i + 1 == n {
            kept.push(p);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::curve::{PrPoint, RocPoint};

    fn pr(ap: f64) -> PrCurve {
        let point = |k: usize| PrPoint {
            threshold: None,
            recall: k as f64 / 1000.0,
            precision: 1.0 - (k as f64 / 1000.0).powi(4) * (1.1 - ap),
        };
        PrCurve { ap, faces: 1, points: (0..=1000).map(point).collect() }
    }

    #[test]
    fn pictures_name_axes_and_curves_best_first() {
        let (low, high) = (pr(0.5), pr(0.907));
        let svg = precision_recall_svg("WIDER FACE hard", &[("a<b", &low), ("farface", &high)]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for text in ["Recall", "Precision", "WIDER FACE hard", "farface  AP 0.907", "a&lt;b  AP 0.500"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.find("farface").unwrap() < svg.find("a&lt;b").unwrap());
        assert_eq!(svg.matches("stroke=\"#0072B2\"").count(), 2, "one curve, one legend line");
    }

    #[test]
    fn roc_pictures_stop_at_the_budget_and_stay_small() {
        let point = |k: usize| RocPoint {
            false_positives: k as f64,
            true_positive_rate: 1.0 - 1.0 / (1.0 + k as f64),
            threshold: None,
        };
        let roc = RocCurve { points: (0..50_000).map(point).collect() };
        let svg = roc_svg("FDDB discrete", &[("farface", &roc)], 2000).unwrap();
        for text in ["False positives", "True-positive rate", "farface  1.000"] {
            assert!(svg.contains(text), "{text}");
        }
        assert!(svg.len() < 60_000, "{}", svg.len());
    }

    #[test]
    fn empty_curves_are_drawn_as_empty_pictures() {
        assert!(precision_recall_svg("", &[("none", &PrCurve::default())]).unwrap().contains("AP 0.000"));
        assert!(roc_svg("", &[], 0).unwrap().contains("</svg>"));
    }
}
