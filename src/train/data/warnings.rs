//! What was skipped, counted by kind.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Names kept of each kind.
const NAMES: usize = 3;

/// Why something was skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum WarningKind {
    /// No file of that name, with any extension that is read.
    MissingPicture,
    /// A label file without a picture of its name.
    UnusedLabels,
    /// Not a picture, damaged, truncated, or too large.
    UndecodablePicture,
    /// Width or height is 0, negative or not a number.
    EmptyBox,
    /// The box lies wholly outside its picture.
    OutsideBox,
}

impl WarningKind {
    fn describe(self) -> &'static str {
        match self {
            WarningKind::MissingPicture => "missing pictures",
            WarningKind::UnusedLabels => "label files without a picture",
            WarningKind::UndecodablePicture => "undecodable pictures",
            WarningKind::EmptyBox => "boxes without size",
            WarningKind::OutsideBox => "boxes outside their picture",
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Count {
    count: u64,
    names: Vec<String>,
}

/// Counts of skipped input; clones share them. Displays as one sentence, empty where nothing was
/// skipped.
#[derive(Clone, Debug, Default)]
pub struct Warnings(Arc<Mutex<BTreeMap<WarningKind, Count>>>);

impl Warnings {
    /// Counts one; `name` is the picture or file at fault.
    pub fn add(&self, kind: WarningKind, name: &str) {
        let mut counts = self.counts();
        let entry = counts.entry(kind).or_default();
        entry.count += 1;
        if entry.names.len() < NAMES && !entry.names.iter().any(|known| known == name) {
            entry.names.push(name.into());
        }
    }

    /// How often `kind` was counted.
    pub fn count(&self, kind: WarningKind) -> u64 {
        self.counts().get(&kind).map_or(0, |c| c.count)
    }

    /// The first few different names of `kind`.
    pub fn names(&self, kind: WarningKind) -> Vec<String> {
        self.counts().get(&kind).map_or(Vec::new(), |c| c.names.clone())
    }

    /// How much was skipped.
    pub fn total(&self) -> u64 {
        self.counts().values().map(|c| c.count).sum()
    }

    /// True where nothing was skipped.
    pub fn is_empty(&self) -> bool {
        self.counts().is_empty()
    }

    /// Counts are whole after every statement, so those of a panicked thread are good.
    fn counts(&self) -> MutexGuard<'_, BTreeMap<WarningKind, Count>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Warnings {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        for (i, (kind, Count { count, names })) in self.counts().iter().enumerate() {
            let lead = if i == 0 { "skipped " } else { "; " };
            let more = if (names.len() as u64) < *count { ", .." } else { "" };
            write!(f, "{lead}{count} {} ({}{more})", kind.describe(), names.join(", "))?;
        }
        Ok(())
    }
}
