//! Networks as lists of layers, and their way to a plan: build, load weights, fold and fuse, place
//! in an arena, run.

pub mod build;
pub mod demand;
pub mod exec;
mod fold;
pub mod fuse;
pub mod init;
pub mod onnx;
pub mod plan;
mod protobuf;
pub mod reach;
pub mod weights;

pub use build::{Builder, Graph, NodeId};
pub use demand::Want;
pub use exec::run_reference;
pub use fuse::Compiled;
pub use plan::{Plan, StepInfo};
pub use reach::Reach;
pub use weights::Weights;
