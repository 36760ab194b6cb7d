//! A page of panels above one x axis, as SVG: how quantities of a training go.

use std::ops::Range;

use plotters::coord::ranged1d::{NoDefaultFormatting, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::coord::Shift;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use super::{simplified, COLOURS, FONT, GREY, GRID};
use crate::{Error, Result};

/// Size of a page in SVG units (pixels at scale 1), and height of its title.
const SIZE: (u32, u32) = (1280, 860);
const TITLE: u32 = 48;

/// Dash and gap of the strokes of a line, in pixels; the first is solid.
const DASHES: [[i32; 2]; 4] = [[0, 0], [8, 4], [3, 3], [12, 6]];

/// A page.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Above all.
    pub title: String,
    /// What x is.
    pub x: String,
    /// From the least to the greatest x.
    pub range: Range<f64>,
    /// Where the x axis has a number, and how it is written.
    pub ticks: Vec<(f64, String)>,
    /// Columns of panels, from top to bottom.
    pub columns: Vec<Vec<Panel>>,
}

/// A panel.
#[derive(Clone, Debug, Default)]
pub struct Panel {
    /// What y is.
    pub title: String,
    /// Its share of the column's height.
    pub height: f64,
    /// Whether y is logarithmic where it spans more than a factor of 4 and is above 0 throughout.
    pub log: bool,
    /// The legend lies at the bottom, not at the top.
    pub legend_below: bool,
    /// Drawn one over the other.
    pub lines: Vec<Line>,
}

/// A quantity.
#[derive(Clone, Debug, Default)]
pub struct Line {
    /// Name in the legend, if it is to be there.
    pub label: Option<String>,
    /// Number of its colour.
    pub colour: usize,
    /// Number of its dashing; 0 is solid.
    pub dash: usize,
    /// What it looks like.
    pub look: Look,
    /// x and y, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// What a line looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Look {
    /// A line.
    #[default]
    Line,
    /// A pale, thin line in the background; its extremes are cut off.
    Faint,
    /// A line with a dot on each point and a ring around the one at this x.
    Dotted(Option<f64>),
}

/// The page as SVG. Points that are not finite are left out.
pub fn page_svg(page: &Page) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, page).map_err(|e| Error::Internal(format!("plot {:?}: {e}", page.title)))?;
    Ok(svg)
}

type Outcome = std::result::Result<(), Box<dyn std::error::Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(svg: &mut String, page: &Page) -> Outcome {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(TITLE);
    head.draw(&Text::new(page.title.clone(), (18, 16), (FONT, 22)))?;
    for (column, area) in page.columns.iter().zip(body.split_evenly((1, page.columns.len().max(1)))) {
        let whole: f64 = column.iter().map(|p| p.height).sum();
        let (_, height) = area.dim_in_pixel();
        let (mut rest, mut above, mut cut) = (area, 0.0, 0);
        for panel in column {
            above += panel.height / whole * f64::from(height);
            let (own, below) = rest.split_vertically(above.round() as u32 - cut);
            draw_panel(&own, page, panel)?;
            (rest, cut) = (below, above.round() as u32);
        }
    }
    root.present()?;
    Ok(())
}

/// The y axis: values or their logarithms, between two of them, with numbers at some.
struct Axis {
    log: bool,
    range: Range<f64>,
    ticks: Vec<f64>,
}

impl Axis {
    fn of(panel: &Panel) -> Self {
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for line in &panel.lines {
            let mut values: Vec<f64> = line.points.iter().map(|p| p.1).filter(|v| v.is_finite()).collect();
            values.sort_by(f64::total_cmp);
            if values.is_empty() {
                continue;
            }
            let cut = if line.look == Look::Faint { values.len() / 50 } else { 0 };
            least = least.min(values[cut]);
            most = most.max(values[values.len() - 1 - cut]);
        }
        if least > most {
            (least, most) = (0.0, 1.0);
        }
        let log = panel.log && least > 0.0 && most / least > 4.0;
        let [from, to] = if log { [least.log10(), most.log10()] } else { [least, most] };
        let span = if to > from { to - from } else { from.abs().max(1e-3) };
        let range = from - 0.06 * span..to + 0.06 * span;
        let ticks = if log { log_ticks(&range) } else { linear_ticks(&range, 5) };
        Self { log, range, ticks }
    }

    /// Where on the axis `v` lies, at its ends where it is beyond them.
    fn at(&self, v: f64) -> f64 {
        (if self.log { v.log10() } else { v }).clamp(self.range.start, self.range.end)
    }
}

/// The round numbers (1, 2 or 5 times a power of ten apart) in a range, about `count` of them.
pub fn linear_ticks(range: &Range<f64>, count: usize) -> Vec<f64> {
    let rough = (range.end - range.start) / count.max(1) as f64;
    if !(rough.is_finite() && rough > 0.0) {
        return Vec::new();
    }
    let ten = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|m| m * ten).into_iter().find(|s| *s >= rough).unwrap_or(10.0 * ten);
    let first = (range.start / step).ceil() as i64;
    let last = (range.end / step).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// Logarithms of powers of ten, the fewer they are the more multiples between them, in a range of logarithms.
fn log_ticks(range: &Range<f64>) -> Vec<f64> {
    let decades = range.end - range.start;
    let factors: &[u32] = match decades {
        d if d < 1.2 => &[1, 2, 3, 5, 7],
        d if d < 3.0 => &[1, 2, 5],
        _ => &[1],
    };
    let powers = range.start.floor() as i32..=range.end.ceil() as i32;
    let ticks = powers.flat_map(|p| factors.iter().map(move |f| f64::from(*f).log10() + f64::from(p)));
    ticks.filter(|t| range.contains(t)).collect()
}

/// A number of an axis: as many digits as it needs.
fn number(v: f64) -> String {
    if v != 0.0 && !(1e-3..1e5).contains(&v.abs()) {
        let text = format!("{v:.2e}");
        let (digits, power) = text.split_once('e').unwrap_or((&text, "0"));
        return format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'));
    }
    let text = format!("{v:.5}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// An axis with numbers at given places.
struct Ticked {
    inner: RangedCoordf64,
    ticks: Vec<f64>,
}

impl Ranged for Ticked {
    type ValueType = f64;
    type FormatOption = NoDefaultFormatting;
    fn range(&self) -> Range<f64> {
        self.inner.range()
    }
    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        self.inner.map(value, limit)
    }
    fn key_points<Hint: plotters::coord::ranged1d::KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }
}

impl ValueFormatter<f64> for Ticked {}

fn draw_panel(area: &Area<'_>, page: &Page, panel: &Panel) -> Outcome {
    let y = Axis::of(panel);
    let whole = if page.range.end > page.range.start { page.range.clone() } else { 0.0..1.0 };
    let x_axis = Ticked { inner: whole.clone().into(), ticks: page.ticks.iter().map(|t| t.0).collect() };
    let y_axis = Ticked { inner: y.range.clone().into(), ticks: y.ticks.clone() };
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .margin_left(18)
        .margin_right(32)
        .caption(&panel.title, (FONT, 16))
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d(x_axis, y_axis)?;
    let tick = |v: &f64| page.ticks.iter().find(|t| t.0 == *v).map_or_else(String::new, |t| t.1.clone());
    let value = |v: &f64| number(if y.log { 10f64.powf(*v) } else { *v });
    chart
        .configure_mesh()
        .x_desc(&page.x)
        .max_light_lines(0)
        .bold_line_style(GRID)
        .axis_style(GREY)
        .label_style((FONT, 13, &GREY))
        .axis_desc_style((FONT, 13, &GREY))
        .x_label_formatter(&tick)
        .y_label_formatter(&value)
        .draw()?;
    let mut named = false;
    for line in &panel.lines {
        let colour = COLOURS[line.colour % COLOURS.len()];
        let finite = line.points.iter().filter(|p| p.0.is_finite() && p.1.is_finite());
        let points: Vec<(f64, f64)> = finite.map(|&(x, v)| (x, y.at(v))).collect();
        let (width, height) = area.dim_in_pixel();
        let points = simplified(points, [(&whole, width), (&y.range, height)]);
        let style = match line.look {
            Look::Faint => colour.mix(0.3).stroke_width(1),
            _ => colour.stroke_width(2),
        };
        if let Look::Dotted(best) = line.look {
            let ring = points.iter().filter(|p| Some(p.0) == best);
            chart.draw_series(ring.map(|&p| Circle::new(p, 6, colour.stroke_width(2))))?;
            chart.draw_series(points.iter().map(|&p| Circle::new(p, 2, colour.filled())))?;
        }
        let [dash, gap] = DASHES[line.dash % DASHES.len()];
        let drawn = if dash == 0 {
            chart.draw_series(LineSeries::new(points, style))?
        } else {
            chart.draw_series(DashedLineSeries::new(points, dash, gap, style))?
        };
        let Some(label) = &line.label else { continue };
        named = true;
        drawn.label(label).legend(move |(x, y)| {
            let ends = [(x, y), (x + 24, y)];
            match dash {
                0 => PathElement::new(ends, style).into_dyn(),
                _ => DashedPathElement::new(ends, dash, gap, style).into_dyn(),
            }
        });
    }
    if named {
        let below = panel.legend_below;
        chart
            .configure_series_labels()
            .position(if below { SeriesLabelPosition::LowerRight } else { SeriesLabelPosition::UpperRight })
            .margin(10)
            .legend_area_size(32)
            .background_style(WHITE.mix(0.85))
            .border_style(RGBColor(200, 200, 200))
            .label_font((FONT, 13))
            .draw()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        let near =
            |a: &[f64], b: &[f64]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-9);
        assert!(near(&linear_ticks(&(0.0..1.0), 5), &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]));
        assert!(near(&linear_ticks(&(-7.0..130.0), 3), &[0.0, 50.0, 100.0]));
        assert!(linear_ticks(&(1.0..1.0), 5).is_empty() && linear_ticks(&(0.0..f64::NAN), 5).is_empty());
        let values = |r: Range<f64>| log_ticks(&r).iter().map(|t| number(10f64.powf(*t))).collect::<Vec<_>>();
        assert_eq!(values(-1.1..1.2), ["0.1", "0.2", "0.5", "1", "2", "5", "10"]);
        assert_eq!(values(-0.1..0.9), ["1", "2", "3", "5", "7"]);
        assert_eq!(values(-6.1..-2.9), ["1e-6", "1e-5", "1e-4", "0.001"]);
        assert_eq!([0.0, 0.05, 125.0, 3e-6, 2.5e7].map(number), ["0", "0.05", "125", "3e-6", "2.5e7"]);
    }

    #[test]
    fn extremes_of_faint_lines_do_not_stretch_the_axis() {
        let line = |look, spike: f64| Line {
            look,
            points: (0..1000)
                .map(|i| (f64::from(i), if i == 500 { spike } else { 1.0 + f64::from(i % 10) / 10.0 }))
                .collect(),
            ..Line::default()
        };
        let axis = |look| Axis::of(&Panel { lines: vec![line(look, 1e6)], ..Panel::default() }).range.end;
        assert!(axis(Look::Faint) < 2.0 && axis(Look::Line) > 1e6);
    }

    #[test]
    fn pages_draw_what_they_are_given_and_bear_what_is_not_finite() {
        let line = |look| Line {
            label: Some("a<b".into()),
            look,
            points: vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 1000.0)],
            ..Line::default()
        };
        let lines = vec![line(Look::Faint), line(Look::Line), line(Look::Dotted(Some(2.0)))];
        let panel = |log| Panel {
            title: "losses".into(),
            height: 1.0,
            log,
            lines: lines.clone(),
            ..Panel::default()
        };
        let mut page = Page {
            title: "run".into(),
            x: "steps".into(),
            range: 0.0..2.0,
            ticks: vec![(0.0, "none".into()), (2.0, "two".into())],
            columns: vec![vec![panel(true), panel(false)], vec![Panel { height: 1.0, ..Panel::default() }]],
        };
        let svg = page_svg(&page).unwrap();
        for text in ["run", "losses", "steps", "none", "two", "a&lt;b", "100"] {
            assert!(svg.contains(&format!("\n{text}\n")), "{text}");
        }
        assert!(!svg.contains("NaN"));
        page = Page::default();
        assert!(page_svg(&page).unwrap().contains("</svg>"));
    }
}
