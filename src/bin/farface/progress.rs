//! Progress on standard error, where that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Fewer items than this show no bar.
const FEW: usize = 4;

/// Bar over `total` items; hidden where they are few or nobody watches.
pub fn bar(total: usize, what: &'static str) -> ProgressBar {
    if total < FEW {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:>10} [{bar:40}] {pos}/{len}  {elapsed} (ETA {eta})")
        .expect("the template is correct")
        .progress_chars("=> ");
    ProgressBar::new(total as u64).with_style(style).with_message(what)
}

/// What the library's long functions report to.
pub fn follow(bar: &ProgressBar) -> impl FnMut(usize, usize) + '_ {
    |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    }
}
