//! Trainings written to disk and taken up again.

use super::Trainer;
use crate::error::{Error, Result};
use crate::graph::init::{fnv1a, FNV_OFFSET};
use crate::train::checkpoint::{Checkpoint, Setting};
use std::path::Path;

impl Trainer {
    fn setting(&self) -> Setting {
        let mut data = FNV_OFFSET;
        let mut add = |bytes: &[u8]| data = fnv1a(data, bytes);
        for sample in &self.dataset.samples {
            add(sample.name.as_bytes());
            for face in &sample.faces {
                let b = face.bbox;
                [b.x1, b.y1, b.x2, b.y2].iter().for_each(|v| add(&v.to_le_bytes()));
                add(&[u8::from(face.ignore)]);
            }
        }
        Setting {
            precision: self.engine.precision().into(),
            isa: self.engine.machine(),
            pictures: self.dataset.samples.len(),
            data,
        }
    }

    /// Goes on from a checkpoint of the same recipe, on the same pictures and in the same precision. On another
    /// ISA the last bits differ, which [`Trainer::notes`] then tells. An error leaves the training as it was.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let checkpoint = Checkpoint::load(self.engine.graph(), path)?;
        self.take_up(checkpoint, &path.display().to_string())
    }

    /// Goes on from a checkpoint, which errors call `name`.
    pub(super) fn take_up(&mut self, c: Checkpoint, name: &str) -> Result<()> {
        if c.recipe != self.text {
            return Err(Error::InvalidArgument(format!(
                "{name}: belongs to another recipe; recipe.toml beside it is a copy of its own, whose text the given one must have"
            )));
        }
        let (was, is) = (&c.setting, self.setting());
        let differs = |what: String| Err(Error::InvalidArgument(format!("{name}: {what}")));
        if was.precision != is.precision {
            return differs(format!(
                "trained in {}, this machine would go on in {}",
                was.precision, is.precision
            ));
        }
        if (was.pictures, was.data) != (is.pictures, is.data) {
            return differs(format!(
                "trained on {} pictures, now there are {}, or their names or boxes changed",
                was.pictures, is.pictures
            ));
        }
        if self.ema.is_some() != c.average.is_some() {
            return Err(Error::InvalidData(format!("{name}: its averages do not fit")));
        }
        // The last that may fail; it changes nothing where it does.
        self.optimizer.load(&c.optimizer)?;
        self.engine.params()?.clone_from_slice(&c.params);
        self.engine.replaced();
        if let (Some(ema), Some((updates, average))) = (&mut self.ema, c.average) {
            (ema.updates, ema.average) = (updates, average);
        }
        if was.isa != is.isa {
            self.notes.push(format!(
                "{} before, {} now: the last bits will differ from those of a run that was not stopped",
                was.isa, is.isa
            ));
        }
        (self.step, self.best, self.loader) = (c.step, c.best, None);
        Ok(())
    }

    /// Writes a checkpoint.
    pub fn save(&mut self, path: &Path) -> Result<()> {
        self.state()?.save(self.engine.graph(), path)
    }

    /// All that it goes on from.
    pub(super) fn state(&mut self) -> Result<Checkpoint> {
        self.check_finite()?;
        Ok(Checkpoint {
            setting: self.setting(),
            step: self.step,
            params: self.engine.params()?.to_vec(),
            average: self.ema.as_ref().map(|e| (e.updates, e.average.clone())),
            optimizer: self.optimizer.save(),
            best: self.best,
            recipe: self.text.clone(),
        })
    }

    /// Errors where a parameter, an average or the optimiser's state is no finite number: such a checkpoint or model could
    /// not be read again, and must not take the place of a sound one.
    pub(super) fn check_finite(&mut self) -> Result<()> {
        self.engine.settle(&mut self.optimizer, self.ema.as_mut())?;
        let names: Vec<String> = self.engine.graph().params.iter().map(|p| p.name.clone()).collect();
        let average = self.ema.as_ref().map(|e| &e.average[..]).unwrap_or_default();
        let params = self.engine.params()?.iter().zip(&names).chain(average.iter().zip(&names));
        let bad = |v: &[f32]| !v.iter().all(|v| v.is_finite());
        let mut broken = params.filter(|(v, _)| bad(v)).map(|(_, name)| name.clone()).next();
        if broken.is_none() {
            broken = self.optimizer.first_non_finite();
        }
        broken.map_or(Ok(()), |name| {
            Err(Error::InvalidData(format!(
                "training stopped at step {}: {name} is no longer finite (a lower learning rate or clip may help). The last checkpoint is sound",
                self.step
            )))
        })
    }
}
