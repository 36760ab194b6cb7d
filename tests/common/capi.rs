//! The C interface as tests use it: handles that destroy themselves, pictures that own their pixels.

use farface::capi::{image::*, model::*, options::*, session::*, status::*};
use std::ffi::{c_void, CStr, CString};
use std::mem::MaybeUninit;
use std::path::Path;

pub struct Model(pub *mut farface_model);
pub struct Session(pub *mut farface_session);

// SAFETY: models may be used from anywhere, sessions from one thread at a time.
unsafe impl Send for Model {}
// SAFETY: as above.
unsafe impl Sync for Model {}
// SAFETY: as above.
unsafe impl Send for Session {}

impl Drop for Model {
    fn drop(&mut self) {
        // SAFETY: made by `load`, destroyed once.
        unsafe { farface_model_destroy(self.0) }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: made by `session`, destroyed once.
        unsafe { farface_session_destroy(self.0) }
    }
}

/// This thread's last message.
pub fn message() -> String {
    // SAFETY: the library's own text.
    unsafe { CStr::from_ptr(farface_last_error()) }.to_str().unwrap().to_string()
}

/// Loads a model file; the status where it fails.
pub fn load(path: &Path) -> Result<Model, farface_status> {
    let path = CString::new(path.to_str().unwrap()).unwrap();
    let mut model = std::ptr::null_mut();
    // SAFETY: live places.
    match unsafe { farface_model_load(path.as_ptr(), &mut model) } {
        FARFACE_OK => Ok(Model(model)),
        status => {
            assert!(model.is_null());
            Err(status)
        }
    }
}

/// The random model of this number.
pub fn model(seed: u64) -> Model {
    let folder = tempfile::tempdir().unwrap();
    load(&super::model::file(folder.path(), seed)).unwrap()
}

/// The model's own settings.
pub fn options(model: &Model) -> farface_session_options {
    let mut options = MaybeUninit::uninit();
    let size = size_of::<farface_session_options>();
    // SAFETY: live places; init fills the struct.
    unsafe {
        assert_eq!(farface_session_options_init(options.as_mut_ptr(), size, model.0), FARFACE_OK);
        options.assume_init()
    }
}

/// A session with these settings.
pub fn session(model: &Model, options: &farface_session_options) -> Session {
    let mut session = std::ptr::null_mut();
    // SAFETY: live places.
    let status = unsafe { farface_session_create(model.0, options, &mut session) };
    assert_eq!(status, FARFACE_OK, "{}", message());
    Session(session)
}

/// A picture and its pixels.
#[derive(Clone)]
pub struct Picture {
    pub pixels: Vec<u8>,
    pub image: farface_image,
    offsets: [usize; 3],
}

// SAFETY: the pointers in `image` are filled in by `view` alone.
unsafe impl Sync for Picture {}

impl Picture {
    fn new(width: usize, height: usize, format: farface_format, pixels: Vec<u8>) -> Self {
        let plane = farface_plane { data: std::ptr::null(), stride: 0 };
        let image = farface_image {
            width: width as u32,
            height: height as u32,
            format,
            rotation: 0,
            mirrored: 0,
            matrix: FARFACE_MATRIX_BT601,
            range: FARFACE_RANGE_LIMITED,
            memory: FARFACE_MEMORY_HOST,
            planes: [plane; 3],
            roi: farface_rect::default(),
            reserved: [0; 4],
        };
        Self { pixels, image, offsets: [0; 3] }
    }

    /// Random RGB pixels.
    pub fn rgb(width: usize, height: usize, seed: u64) -> Self {
        Self::rgb_of(width, height, super::model::picture(width, height, seed))
    }

    /// These RGB pixels.
    pub fn rgb_of(width: usize, height: usize, pixels: Vec<u8>) -> Self {
        let mut picture = Self::new(width, height, FARFACE_FORMAT_RGB8, pixels);
        picture.image.planes[0].stride = 3 * width as isize;
        picture
    }

    /// Random NV12 pixels.
    pub fn nv12(width: usize, height: usize, seed: u64) -> Self {
        let pairs = width.div_ceil(2);
        let bytes = width * height + 2 * pairs * height.div_ceil(2);
        let pixels = super::model::picture(bytes.div_ceil(3), 1, seed);
        let mut picture = Self::new(width, height, FARFACE_FORMAT_NV12, pixels);
        picture.image.planes[0].stride = width as isize;
        picture.image.planes[1].stride = 2 * pairs as isize;
        picture.offsets[1] = width * height;
        picture
    }

    /// The same picture, to be turned clockwise.
    pub fn turned(mut self, degrees: u32) -> Self {
        self.image.rotation = degrees;
        self
    }

    /// The struct with pointers into the pixels; valid while this picture stays where it is.
    pub fn view(&self) -> farface_image {
        let mut image = self.image;
        for (plane, &offset) in image.planes.iter_mut().zip(&self.offsets) {
            plane.data = self.pixels[offset..].as_ptr().cast::<c_void>();
        }
        image
    }
}
