//! Templates: the sizes of face that HR has a detector each for, and the level of the pyramid that each was made for
//! (section 3.2).

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// t(h, w, sigma) of section 3.2.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Template {
    /// Pixels of the level that it was made for.
    pub width: f32,
    /// Likewise.
    pub height: f32,
    /// sigma, that level's scale: 0.5, 1 or 2.
    pub scale: f32,
}

/// Which templates a level of the pyramid asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateChoice {
    /// Section 3.3: type A (made for scale 1: faces of 40 to 140 px) on every level, type B (made for scale 2: faces under
    /// 20 px) on enlarged levels, of which a single picture has one between 1 and 2, too; the others nowhere, as a smaller or
    /// larger level does their work.
    AAndB,
    /// Each template on the level it was made for; other levels ask nothing.
    Full,
}

/// Faces that type B finds are less high than this in the picture, pixels.
pub const TYPE_B_PX: f32 = 20.0;

impl Template {
    /// Whether the numbers are such as a model file may have.
    pub(super) fn is_sane(&self) -> bool {
        let side = |v: f32| (1.0..=10_000.0).contains(&v);
        side(self.width) && side(self.height) && (1.0 / 64.0..=64.0).contains(&self.scale)
    }

    fn is_type_a(&self) -> bool {
        self.scale == 1.0
    }

    fn is_type_b(&self) -> bool {
        self.scale > 1.0 && self.height / self.scale < TYPE_B_PX
    }
}

impl TemplateChoice {
    /// Whether a level of this scale asks the template.
    pub fn asks(self, template: &Template, scale: f32) -> bool {
        match self {
            TemplateChoice::AAndB => template.is_type_a() || (template.is_type_b() && scale > 1.0),
            // A quarter of an octave is what rounding a level's size never reaches, and half octaves always pass.
            TemplateChoice::Full => (scale / template.scale).log2().abs() < 0.25,
        }
    }

    /// Whether any level does.
    pub fn asks_somewhere(self, template: &Template) -> bool {
        self == TemplateChoice::Full || template.is_type_a() || template.is_type_b()
    }
}

/// Half widths, half heights and scales of the 25 templates of the published model, K-medoids of WIDER FACE's training boxes
/// of at least 10 px a side. (Their authors' boxes count one pixel more each way.)
const PUBLISHED: [[f32; 3]; 25] = [
    [86.3382, 113.4441, 0.5],
    [48.7500, 65.2500, 0.5],
    [33.2500, 43.7500, 0.5],
    [25.7500, 33.7500, 0.5],
    [40.5000, 54.5000, 1.0],
    [34.5000, 43.5000, 1.0],
    [28.5000, 38.0000, 1.0],
    [25.6589, 31.3221, 1.0],
    [21.6137, 27.5977, 1.0],
    [20.0000, 22.5000, 1.0],
    [17.5000, 25.5000, 1.0],
    [16.3280, 20.8856, 1.0],
    [29.4755, 34.4803, 2.0],
    [25.4202, 37.1061, 2.0],
    [24.2118, 30.2146, 2.0],
    [22.0129, 24.7059, 2.0],
    [19.3142, 28.0202, 2.0],
    [17.9677, 22.7849, 2.0],
    [15.6123, 19.5907, 2.0],
    [13.1842, 18.3421, 2.0],
    [13.5028, 15.0792, 2.0],
    [11.1091, 16.4909, 2.0],
    [10.9769, 14.0478, 2.0],
    [9.9722, 12.4105, 2.0],
    [9.6613, 10.6161, 2.0],
];

/// The templates of the published model.
pub fn published_templates() -> Vec<Template> {
    let template = |[w, h, scale]: [f32; 3]| Template { width: 2.0 * w, height: 2.0 * h, scale };
    PUBLISHED.map(template).to_vec()
}

/// Templates from the text that `farface cluster` writes: a line of names, then `row,half_width,half_height,sigma` a line.
pub fn parse_templates(text: &str) -> Result<Vec<Template>> {
    let mut templates = Vec::new();
    for (number, line) in text.lines().enumerate().skip(1).filter(|(_, line)| !line.trim().is_empty()) {
        let bad = || {
            Error::InvalidData(format!(
                "line {}: expected row,half_width,half_height,sigma with sides from 1 to 10000 px and sigma 1/64 to 64, got {line:?}",
                number + 1
            ))
        };
        let numbers: Option<Vec<f32>> = line.split(',').map(|v| v.trim().parse().ok()).collect();
        let [_, w, h, scale] = numbers.ok_or_else(bad)?[..] else { return Err(bad()) };
        let template = Template { width: 2.0 * w, height: 2.0 * h, scale };
        if !template.is_sane() {
            return Err(bad());
        }
        templates.push(template);
    }
    if templates.is_empty() {
        return Err(Error::InvalidData("no templates behind the line of names".into()));
    }
    Ok(templates)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of the published table: 5 to 12 are type A, 19 to 25 type B.
    #[test]
    fn levels_ask_the_templates_that_were_made_for_them() {
        let all = published_templates();
        let rows = |choice: TemplateChoice, scale: f32| -> Vec<usize> {
            (1..=25).filter(|&row| choice.asks(&all[row - 1], scale)).collect()
        };
        let a: Vec<usize> = (5..=12).collect();
        for scale in [0.25, 0.5, 1.0] {
            assert_eq!(rows(TemplateChoice::AAndB, scale), a, "{scale}");
        }
        assert_eq!(rows(TemplateChoice::AAndB, 2.0), (5..=12).chain(19..=25).collect::<Vec<_>>());
        assert_eq!(rows(TemplateChoice::Full, 0.5), (1..=4).collect::<Vec<_>>());
        assert_eq!(rows(TemplateChoice::Full, 1.0), a);
        assert_eq!(rows(TemplateChoice::Full, 2.0), (13..=25).collect::<Vec<_>>());
        assert!(rows(TemplateChoice::Full, 0.25).is_empty());
    }

    #[test]
    fn a_table_is_read_and_what_is_wrong_with_it_is_named() {
        let text = "row,half_width,half_height,sigma\n1,10,12.5,2\n\n2, 20 ,25,1\n";
        let expected = [[20.0, 25.0, 2.0], [40.0, 50.0, 1.0]];
        let expected = expected.map(|[width, height, scale]| Template { width, height, scale });
        assert_eq!(parse_templates(text).unwrap(), expected);
        for (wrong, line) in
            [("x\n1,2,3\n", "line 2"), ("x\n1,2,3,1\n2,0,3,1\n", "line 3"), ("x\n1,a,3,1\n", "line 2")]
        {
            let error = parse_templates(wrong).unwrap_err().to_string();
            assert!(error.contains(line), "{error}");
        }
        assert!(parse_templates("row\n").is_err());
    }
}
