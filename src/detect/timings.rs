//! What the parts of a detection take.

use std::time::Duration;

/// Wall time of the parts of one detection.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// Pixels to network input.
    pub input: Duration,
    /// The network.
    pub network: Duration,
    /// Outputs to candidates.
    pub decode: Duration,
    /// Sorting, suppression, coordinates.
    pub merge: Duration,
}
