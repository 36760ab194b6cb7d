//! The `farface` program: `detect`, `inspect`, `bench`, `eval`, `convert`, `quantize`,
//! `detectors`, `train`, `plot`.
//!
//! Results go to standard output, progress and errors to standard error. Exit code 0: all went
//! well; 1: something failed, named on a line that starts with `error:`; 2: wrong usage.

#![forbid(unsafe_code)]

mod bench;
#[cfg(feature = "train")]
mod cluster;
mod convert;
mod detect;
mod detectors;
mod draw;
#[cfg(feature = "train")]
mod ellipse;
mod eval;
mod inspect;
mod model;
mod peak;
mod picture;
mod plot;
mod progress;
mod quantize;
mod report;
mod settings;
#[cfg(feature = "train")]
mod train;

use clap::{Parser, Subcommand};
use std::io::{BufWriter, ErrorKind, Write};
use std::process::ExitCode;

/// Finds faces in pictures, the far and tiny ones too.
#[derive(Parser)]
#[command(name = "farface", version, arg_required_else_help = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Detect(detect::Args),
    Inspect(inspect::Args),
    Bench(bench::Args),
    Eval(eval::Args),
    Convert(convert::Args),
    Quantize(quantize::Args),
    Detectors(detectors::Args),
    #[cfg(feature = "train")]
    Train(train::Args),
    #[cfg(feature = "train")]
    Cluster(cluster::Args),
    #[cfg(feature = "train")]
    Ellipse(ellipse::Args),
    Plot(plot::Args),
}

/// Whether a command did all it was asked for; what it could not do it has reported itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Complete,
    Partial,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut out = BufWriter::new(std::io::stdout().lock());
    let result = match cli.command {
        Command::Detect(args) => detect::run(&args, &mut out),
        Command::Inspect(args) => inspect::run(&args, &mut out),
        Command::Bench(args) => bench::run(&args, &mut out),
        Command::Eval(args) => eval::run(&args, &mut out),
        Command::Convert(args) => convert::run(&args, &mut out),
        Command::Quantize(args) => quantize::run(&args, &mut out),
        Command::Detectors(args) => detectors::run(&args, &mut out),
        #[cfg(feature = "train")]
        Command::Train(args) => train::run(&args, &mut out),
        #[cfg(feature = "train")]
        Command::Cluster(args) => cluster::run(&args, &mut out),
        #[cfg(feature = "train")]
        Command::Ellipse(args) => ellipse::run(&args, &mut out),
        Command::Plot(args) => plot::run(&args, &mut out),
    };
    match result.and_then(|outcome| Ok(out.flush().map(|()| outcome)?)) {
        Ok(Outcome::Complete) => ExitCode::SUCCESS,
        Ok(Outcome::Partial) => ExitCode::from(1),
        // The reader of a pipe has seen enough.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            report_error(&e);
            ExitCode::from(1)
        }
    }
}

/// One line with the error and its causes.
fn report_error(error: &anyhow::Error) {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        // Error::Io names its cause itself.
        if !text.ends_with(&cause) {
            text = if text.is_empty() { cause } else { format!("{text}: {cause}") };
        }
    }
    eprintln!("error: {}", text.replace('\n', " "));
}
