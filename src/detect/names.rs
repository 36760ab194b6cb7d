//! Names of detectors: a family, its switches, a backbone.

/// Which of the `known` switches `text` holds, one behind another in their order; None where there is anything else.
pub(super) fn switches<const N: usize>(mut text: &str, known: [&str; N]) -> Option<[bool; N]> {
    let taken = known.map(|switch| match text.strip_prefix(switch) {
        Some(rest) => {
            text = rest;
            true
        }
        None => false,
    });
    text.is_empty().then_some(taken)
}
