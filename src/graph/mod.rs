//! Networks as lists of layers, and their way to a plan: build, load weights, fold and fuse, place
//! in an arena, run.

pub mod build;
pub mod calibrate;
pub mod compile;
pub mod demand;
#[cfg(feature = "cuda")]
pub mod device;
mod equalize;
pub mod exec;
mod fold;
pub mod formats;
mod fuse;
pub mod init;
pub mod onnx;
pub mod plan;
mod protobuf;
pub mod reach;
pub mod weights;

pub use build::{Builder, Graph, NodeId};
pub use calibrate::{Calibration, Clip};
pub use compile::Compiled;
pub use demand::Want;
#[cfg(feature = "cuda")]
pub use device::{DeviceNetwork, DevicePlan};
pub use exec::run_reference;
pub use formats::{Numbers, Ranges};
pub use plan::{Plan, StepInfo};
pub use reach::Reach;
pub use weights::Weights;
