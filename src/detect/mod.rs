//! From feature maps to faces: anchors, decoding, filtering, merging; models and sessions.
//!
//! ```no_run
//! use farface::detect::{Model, Session};
//! use farface::pixels::{ImageView, PixelFormat};
//!
//! let model = Model::load("model.safetensors")?;
//! let mut session = Session::new(&model)?;
//! let rgb = vec![0u8; 640 * 480 * 3]; // a frame from somewhere
//! let frame = ImageView::packed(640, 480, PixelFormat::Rgb8, &rgb)?;
//! for face in session.detect(&frame)? {
//!     println!("{:?} {:.2}", face.bbox, face.score);
//! }
//! # Ok::<(), farface::Error>(())
//! ```

pub mod anchors;
pub mod boxes;
mod candidates;
pub mod config;
pub mod detector;
#[cfg(feature = "cuda")]
pub mod device;
pub mod face;
pub mod group_sampling;
pub mod hambox;
pub mod heads;
mod host;
pub mod hr;
mod input;
pub mod model;
mod names;
pub mod nms;
pub mod options;
mod passes;
pub mod pyramid;
pub mod quantize;
pub mod refineface;
pub mod retinaface;
pub mod second_stage;
pub mod session;
mod timings;

pub use boxes::{BBox, Detection};
pub use config::ModelConfig;
pub use face::{Ellipse, Face};
pub use model::Model;
pub use nms::Suppression;
pub use options::{DevicePolicy, Options, Precision, Pyramid, Scales};
pub use passes::LevelCost;
pub use session::Session;
pub use timings::Timings;
