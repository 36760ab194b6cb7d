//! Decoded pictures.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::train::data::{Dataset, Picture, WarningKind};
use crate::{Error, Result};

/// Pictures by index of their sample; the first that fit stay.
pub(super) struct Cache {
    dataset: Arc<Dataset>,
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pictures: HashMap<usize, Arc<Picture>>,
    bytes: usize,
    /// Samples that could not be decoded; each was counted once.
    bad: BTreeSet<usize>,
}

impl Cache {
    pub(super) fn new(dataset: Arc<Dataset>, limit: usize) -> Self {
        Self { dataset, limit, state: Mutex::default() }
    }

    pub(super) fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// The picture of sample `index`, or of the next one in the data set that can be decoded, and
    /// its index. Fails where none can.
    pub(super) fn picture(&self, index: usize) -> Result<(usize, Arc<Picture>)> {
        let samples = &self.dataset.samples;
        let mut last = None;
        for index in (index..samples.len()).chain(0..index) {
            {
                let state = self.state();
                if state.bad.contains(&index) {
                    continue;
                }
                if let Some(picture) = state.pictures.get(&index) {
                    return Ok((index, picture.clone()));
                }
            }
            match Picture::open(&samples[index].path) {
                Ok(picture) => return Ok((index, self.keep(index, picture))),
                // Another time it may be read: a training that went on without it could not be repeated.
                Err(error @ Error::Io { .. }) => return Err(error),
                Err(error) => {
                    if self.state().bad.insert(index) {
                        self.dataset.warnings.add(WarningKind::UndecodablePicture, &samples[index].name);
                    }
                    last = Some(error);
                }
            }
        }
        let reason = last.map_or_else(|| self.dataset.warnings.to_string(), |e| e.to_string());
        Err(Error::InvalidData(format!("none of the {} pictures can be decoded: {reason}", samples.len())))
    }

    fn keep(&self, index: usize, picture: Picture) -> Arc<Picture> {
        let picture = Arc::new(picture);
        let mut state = self.state();
        let bytes = state.bytes + picture.pixels.len();
        if bytes <= self.limit && state.pictures.insert(index, picture.clone()).is_none() {
            state.bytes = bytes;
        }
        picture
    }

    /// The state is whole after every statement that can panic.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
