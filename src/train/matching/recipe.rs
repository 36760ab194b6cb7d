//! The rules of anchor matching that a training recipe can choose.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which anchors a face gets in the second pass of the two-pass scan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecondPass {
    /// Every anchor that meets the three conditions of Section 4.1.
    #[default]
    All,
    /// The one with the highest IoU among them (the paper's singular "the anchor").
    Best,
}

/// How anchors are matched. In TOML: `matching = { kind = "two-pass-scan", lambda1 = 0.6 }`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum MatchingRecipe {
    /// Group Sampling, Section 4.1. First pass (Eq. 1): an anchor whose best IoU C(i) is lambda1 or more
    /// is matched with that face, ignored from lambda2 to lambda1, background below. Second pass: a face
    /// without any anchor gets those that are not matched, whose IoU with it is at least lambda2, and
    /// which overlap no other face more.
    TwoPassScan {
        /// Default 0.6 (RPN and Fast R-CNN).
        #[serde(default = "lambda1")]
        lambda1: f32,
        /// Default 0.4 (RPN; 0.5 in Fast R-CNN).
        #[serde(default = "lambda2")]
        lambda2: f32,
        /// Default `all`.
        #[serde(default, rename = "second-pass")]
        second_pass: SecondPass,
    },
    /// RetinaNet's rule: best IoU at least `positive` is a face, below `negative` background, ignored
    /// between. RefineFace: 0.3/0.7 in the first step, 0.4/0.5 in the second, 0.4/0.7 in its FSM. HR:
    /// 0.3/0.7 with `force-best`.
    Thresholds {
        /// Default 0.4.
        #[serde(default = "negative")]
        negative: f32,
        /// Default 0.5.
        #[serde(default = "positive")]
        positive: f32,
        /// A face without any anchor gets the one that overlaps it most, however little (but above 0),
        /// unless that one is matched already; of two such faces the one with the higher IoU has it.
        /// Default false.
        #[serde(default, rename = "force-best")]
        force_best: bool,
    },
    /// First step of HAMBox (Section 3.2, 4.1): matched from `positive` on, background below, nothing
    /// ignored, faces without an anchor left to [`super::mine_high_quality_anchors`].
    FirstStep {
        /// Default 0.35.
        #[serde(default = "first_step")]
        positive: f32,
    },
}

fn lambda1() -> f32 {
    0.6
}
fn lambda2() -> f32 {
    0.4
}
fn negative() -> f32 {
    0.4
}
fn positive() -> f32 {
    0.5
}
fn first_step() -> f32 {
    0.35
}

impl Default for MatchingRecipe {
    fn default() -> Self {
        Self::TwoPassScan { lambda1: lambda1(), lambda2: lambda2(), second_pass: SecondPass::All }
    }
}

impl MatchingRecipe {
    /// Background below the first, a face from the second on.
    pub(in crate::train) fn thresholds(&self) -> [f32; 2] {
        match *self {
            Self::TwoPassScan { lambda1, lambda2, .. } => [lambda2, lambda1],
            Self::Thresholds { negative, positive, .. } => [negative, positive],
            Self::FirstStep { positive } => [positive; 2],
        }
    }

    /// Errors unless 0 < lower threshold <= upper threshold <= 1.
    pub fn check(&self) -> Result<()> {
        let [low, high] = self.thresholds();
        if low > 0.0 && low <= high && high <= 1.0 {
            return Ok(());
        }
        Err(Error::InvalidArgument(format!(
            "matching: thresholds {low} and {high} must be above 0, in order, up to 1"
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_read_with_defaults_and_are_checked() {
        let parse = |t: &str| serde_json::from_str::<MatchingRecipe>(t);
        assert_eq!(parse(r#"{"kind": "two-pass-scan"}"#).unwrap(), MatchingRecipe::default());
        let refineface = parse(r#"{"kind": "thresholds", "negative": 0.3, "positive": 0.7}"#).unwrap();
        assert_eq!(refineface.thresholds(), [0.3, 0.7]);
        refineface.check().unwrap();
        assert_eq!(parse(r#"{"kind": "first-step"}"#).unwrap().thresholds(), [0.35; 2]);
        assert!(parse(r#"{"kind": "first-step", "negative": 0.3}"#).is_err());
        assert!(MatchingRecipe::Thresholds { negative: 0.0, positive: 0.5, force_best: true }
            .check()
            .is_err());
        assert!(MatchingRecipe::TwoPassScan { lambda1: 0.4, lambda2: 0.6, second_pass: SecondPass::All }
            .check()
            .is_err());
    }
}
