//! The log of a training, log.jsonl: a line of JSON every so many steps and for every evaluation.

use anyhow::{bail, Context, Result};
use farface::files;
use farface::train::dev::DevScore;
use farface::train::trainer::StepReport;
use serde::Serialize;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// A line of the log.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Line<'a> {
    Start {
        version: &'a str,
        step: u64,
        steps: u64,
        pictures: usize,
        faces: usize,
        parameters: usize,
        macs_640x480: u64,
        precision: &'a str,
        threads: usize,
        workers: usize,
    },
    Step {
        step: u64,
        epoch: f64,
        side: usize,
        loss: f64,
        class: f64,
        #[serde(rename = "box")]
        boxes: f64,
        iou: f64,
        faces: f64,
        matched: f64,
        mined: f64,
        gradient_norm: f64,
        lr: f32,
        images_per_second: f64,
    },
    Dev {
        step: u64,
        epoch: f64,
        #[serde(flatten)]
        score: DevScore,
        mean: f64,
        best: bool,
        seconds: f64,
    },
    End {
        step: u64,
        best_mean: Option<f64>,
        best_step: Option<u64>,
    },
}

/// A log that lines are added to.
pub struct Log(File);

impl Log {
    /// Goes on with a log: lines of later steps than `step` (of a run that was killed behind its last checkpoint) are
    /// dropped, and so is a last line that was cut.
    pub fn open(path: &Path, step: u64) -> Result<Self> {
        if path.exists() {
            let text = std::fs::read(path).map_err(|e| farface::Error::io(path, e))?;
            files::write_whole(path, &kept(&text, step).with_context(|| path.display().to_string())?)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Self(file.with_context(|| path.display().to_string())?))
    }

    pub fn write(&mut self, line: &Line<'_>) -> Result<()> {
        writeln!(self.0, "{}", serde_json::to_string(line)?).context("writing the log")
    }
}

/// The lines of the log `text` up to `step`.
fn kept(text: &[u8], step: u64) -> Result<Vec<u8>> {
    let lines = text.split(|&b| b == b'\n').map(<[u8]>::trim_ascii).enumerate();
    let mut lines = lines.filter(|(_, line)| !line.is_empty()).peekable();
    let mut kept = Vec::new();
    while let Some((index, line)) = lines.next() {
        let value: Value = match serde_json::from_slice(line) {
            Ok(value) => value,
            // The last line is cut where the run was killed while it wrote it.
            Err(_) if lines.peek().is_none() => break,
            Err(_) => bail!("line {}: not of a training's log; remove it to go on", index + 1),
        };
        // The end is written anew by whoever comes to it.
        if value["step"].as_u64().is_some_and(|s| s <= step) && value["kind"] != "end" {
            kept.extend_from_slice(line);
            kept.push(b'\n');
        }
    }
    Ok(kept)
}

/// Means over the steps between two lines of the log, and the time that they took.
pub struct Means {
    steps: u64,
    /// In the order of [`Means::take`].
    sums: [f64; 8],
    since: Instant,
}

impl Means {
    /// None yet; the clock runs.
    pub fn new() -> Self {
        Self { steps: 0, sums: [0.0; 8], since: Instant::now() }
    }

    pub fn add(&mut self, r: &StepReport) {
        self.steps += 1;
        let l = &r.losses;
        let values = [
            r.loss,
            l.class,
            l.boxes,
            l.iou,
            l.faces as f64,
            l.matched as f64,
            l.mined as f64,
            r.gradient_norm,
        ];
        self.sums.iter_mut().zip(values).for_each(|(s, v)| *s += v);
    }

    /// Takes `time` that went into something else off the clock.
    pub fn leave_out(&mut self, time: Duration) {
        self.since += time;
    }

    /// Steps a second.
    pub fn speed(&self) -> f64 {
        self.steps as f64 / self.since.elapsed().as_secs_f64()
    }

    /// Loss, its class and box parts, IoU, faces, matched and mined anchors, gradient norm; begins anew.
    pub fn take(&mut self) -> [f64; 8] {
        let n = self.steps.max(1) as f64;
        std::mem::replace(self, Self::new()).sums.map(|s| s / n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_goes_on_at_its_step_without_a_last_line_that_was_cut() {
        let start = r#"{"kind":"start","step":0}"#;
        let (third, sixth) = (r#"{"kind":"step","step":3}"#, r#"{"kind":"step","step":6}"#);
        let end = r#"{"kind":"end","step":3}"#;
        let text = format!("{start}\n{third}\n{end}\n{sixth}\n{{\"kind\":\"st");
        assert_eq!(kept(text.as_bytes(), 3).unwrap(), format!("{start}\n{third}\n").as_bytes());
        // Whole but for its end.
        let text = format!("{start}\n{third}");
        assert_eq!(kept(text.as_bytes(), 3).unwrap(), format!("{start}\n{third}\n").as_bytes());
        assert!(kept(b"", 3).unwrap().is_empty());
    }

    #[test]
    fn a_line_that_is_damaged_elsewhere_is_named() {
        let error = kept(b"{\"kind\":\"start\",\"step\":0}\n{\"kind\n{\"kind\":\"step\",\"step\":3}\n", 3)
            .unwrap_err();
        assert!(error.to_string().starts_with("line 2: "), "{error}");
    }
}
