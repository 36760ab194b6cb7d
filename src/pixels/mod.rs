//! Pictures as views, and their way into the network.
//!
//! [`ImageView`] is a checked, borrowed picture. [`pyramid()`] lists the levels to look at,
//! [`TileGrid`] cuts a level into windows, and [`fill`] writes one window of one level as the
//! network's input: decoded, oriented, resized and normalised in one pass over a few row buffers.
//! [`Placement`] brings coordinates back to the stored picture.
//!
//! ```
//! use farface::pixels::*;
//!
//! let bytes = vec![128u8; 640 * 480 * 3 / 2];
//! let view = ImageView::packed(640, 480, PixelFormat::Nv12, &bytes)?
//!     .with_orientation(Orientation::from_exif(6)?); // to be turned 90 degrees clockwise
//! assert_eq!(view.upright_size(), Size::new(480, 640));
//!
//! let halves = PyramidPolicy::Octaves { min: -1.0, max: 0.0, step: 1.0 };
//! let norm = Normalization { order: ChannelOrder::Bgr, mean: [104.0, 117.0, 123.0], scale: [1.0; 3] };
//! let mut scratch = Scratch::default();
//! for level in pyramid(view.upright_size(), &halves, &PyramidLimits::default())? {
//!     for tile in TileGrid::new(level.size, Size::new(512, 512), 32, 64)?.iter() {
//!         let window = tile.window;
//!         let mut input = vec![0.0; window.width * window.height * 3];
//!         let mut rows = DstRows::packed(&mut input, window.width);
//!         fill(&view, level.size, window, 0..window.height, &norm, &mut rows, &mut scratch)?;
//!         // The network runs on `input`; a detection's centre (x, y) in level pixels lies here:
//!         let [fx, fy] = level.to_upright(view.upright_size());
//!         let (x, y) = (window.x as f32 + 10.0, window.y as f32 + 20.0);
//!         let [_stored_x, _stored_y] = view.placement().stored_point([x * fx, y * fy]);
//!     }
//! }
//! # Ok::<(), farface::Error>(())
//! ```

pub mod convert;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
pub mod device_image;
pub mod placement;
pub mod pyramid;
pub mod rect;
pub mod resize;
mod sample;
pub mod tiles;
pub mod view;
mod yuv;

pub use convert::{ChannelOrder, Normalization};
#[cfg(feature = "cuda")]
pub use device_image::DeviceImage;
pub use placement::{Orientation, Placement, Rotation};
pub use pyramid::{keep_for_faces, pyramid, FaceRange, Level, PyramidLimits, PyramidPolicy};
pub use rect::{Rect, Size, MAX_PIXELS, MAX_SIDE};
pub use resize::{fill, DstRows, Scratch};
pub use tiles::{largest_tile, Tile, TileGrid};
pub use view::{ColorMatrix, ColorRange, ImageView, PixelFormat, Plane};
