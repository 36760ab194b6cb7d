//! Detection
//!
//! Boxes, points and ellipses are in pixels of the picture as stored, before its rotation, whatever
//! the region of interest: origin at the top left corner, x to the right, y down, a pixel's centre
//! at .5. With the same model on the same instruction set, a picture gives the same bits at any
//! number of threads, alone or in any batch. On a CUDA device pictures of a batch are searched
//! together, and the last digits may depend on how many.

use super::guard::{guard, Failure, Out, OutSlice, Result};
use super::image::{farface_image, picture, Picture};
use super::session::{enter, farface_session};
use super::status::*;
use crate::detect::{Face, Session};
use crate::error::Error;
#[cfg(feature = "cuda")]
use crate::{detect::device::Source, gpu::driver::foreign_stream};
use std::ffi::c_void;

/// `landmarks` of the face are set.
pub const FARFACE_FACE_LANDMARKS: u32 = 1;
/// `ellipse` of the face is set.
pub const FARFACE_FACE_ELLIPSE: u32 = 2;

/// An ellipse around a face.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct farface_ellipse {
    /// Centre, pixels.
    pub center_x: f32,
    /// Centre, pixels.
    pub center_y: f32,
    /// Longer half-axis, pixels.
    pub major: f32,
    /// Shorter half-axis, pixels.
    pub minor: f32,
    /// Direction of the longer axis in radians from the x axis, towards positive y.
    pub angle: f32,
}

/// A face. The box may reach past the picture's border where the face does.
#[allow(non_camel_case_types)]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct farface_face {
    /// Left side of the box, pixels.
    pub x: f32,
    /// Upper side of the box, pixels.
    pub y: f32,
    /// Width of the box, pixels.
    pub width: f32,
    /// Height of the box, pixels.
    pub height: f32,
    /// Probability, 0 to 1.
    pub score: f32,
    /// FARFACE_FACE_ bits: which of the following are set. The others are zero.
    pub flags: u32,
    /// x and y of both eyes, the nose and both corners of the mouth, in pixels; the left one of the
    /// upright picture first.
    pub landmarks: [[f32; 2]; 5],
    /// Ellipse, from models that have it.
    pub ellipse: farface_ellipse,
    /// Zero; room for later versions.
    pub reserved: [u32; 11],
}

// Programs hold arrays of these: their sizes are part of the binary interface.
const _: () = assert!(size_of::<farface_face>() == 128);
#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<farface_image>() == 112);

impl From<&Face> for farface_face {
    fn from(f: &Face) -> Self {
        let ellipse = f.ellipse.unwrap_or_default();
        Self {
            x: f.bbox.x1,
            y: f.bbox.y1,
            width: f.bbox.width(),
            height: f.bbox.height(),
            score: f.score,
            flags: f.landmarks.map_or(0, |_| FARFACE_FACE_LANDMARKS)
                | f.ellipse.map_or(0, |_| FARFACE_FACE_ELLIPSE),
            landmarks: f.landmarks.unwrap_or_default(),
            ellipse: farface_ellipse {
                center_x: ellipse.center[0],
                center_y: ellipse.center[1],
                major: ellipse.half_axes[0],
                minor: ellipse.half_axes[1],
                angle: ellipse.angle,
            },
            reserved: [0; 11],
        }
    }
}

/// Finds the faces of a picture, best first, and writes them into the caller's `faces`, which has
/// room for `capacity` of them. `*count` is always the true number: where it exceeds `capacity`,
/// the best `capacity` are in `faces` and the result is FARFACE_ERROR_BUFFER_TOO_SMALL. `faces` may
/// be NULL where `capacity` is 0.
///
/// Ownership: all of it stays the caller's; nothing is kept after the call.
/// Threads: one caller a session at a time.
/// Errors: FARFACE_ERROR_INVALID_IMAGE with the plane or field that is wrong,
/// FARFACE_ERROR_LIMIT_EXCEEDED for a picture too large for the caps; `*count` is then 0.
#[no_mangle]
pub unsafe extern "C" fn farface_detect(
    session: *mut farface_session,
    image: *const farface_image,
    faces: *mut farface_face,
    capacity: usize,
    count: *mut usize,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `count` and `faces`.
        let (count, faces) = unsafe { (Out::new(count, "count")?, OutSlice::new(faces, capacity, "faces")) };
        count.set(0);
        let faces = faces?;
        // SAFETY: the caller's promise about `session`, `image` and its planes.
        unsafe { enter(session, |s| detect_one(s, image, &faces, &count)) }
    })
}

/// Finds the faces of `image_count` pictures of any sizes and formats, as that many calls of
/// farface_detect() would. `faces` has room for `image_count * capacity` faces: those of picture i
/// begin at `faces + i * capacity`, and `counts[i]` is their true number. `statuses[i]` tells how
/// picture i went; `statuses` may be NULL.
///
/// A picture that fails does not keep the others from being searched. The result is FARFACE_OK
/// where all went well, else the status of the first picture that did not, whose message
/// farface_last_error() has. Where the session cannot be entered at all, every status is the result.
///
/// With a session on a CUDA device neighbours of one size are searched together, as many as its
/// memory cap allows, up to eight.
///
/// Ownership and threads as with farface_detect().
/// Errors: those of the pictures; FARFACE_ERROR_INVALID_ARGUMENT where an array is NULL: no picture
/// is then searched and nothing written.
#[no_mangle]
pub unsafe extern "C" fn farface_detect_batch(
    session: *mut farface_session,
    images: *const farface_image,
    image_count: usize,
    faces: *mut farface_face,
    capacity: usize,
    counts: *mut usize,
    statuses: *mut farface_status,
) -> farface_status {
    guard(|| {
        let room = image_count.checked_mul(capacity).ok_or_else(|| {
            Error::InvalidArgument(format!("{image_count} pictures of {capacity} faces overflow memory"))
        })?;
        let wanted = if statuses.is_null() { 0 } else { image_count };
        // SAFETY: the caller's promise about the arrays; that of pictures is only read, each by `view`.
        let (faces, counts, statuses, _) = unsafe {
            (
                OutSlice::new(faces, room, "faces")?,
                OutSlice::new(counts, image_count, "counts")?,
                OutSlice::new(statuses, wanted, "statuses")?,
                OutSlice::new(images.cast_mut(), image_count, "images")?,
            )
        };
        for i in 0..image_count {
            counts.set(i, 0);
            if statuses.len() > 0 {
                statuses.set(i, FARFACE_ERROR_INTERNAL); // until it was searched
            }
        }
        let mut entered = false;
        // SAFETY: the caller's promise about `session`, the pictures and their planes.
        let result = unsafe {
            enter(session, |s| {
                entered = true;
                // The first that failed.
                let mut failed: Option<(usize, Failure)> = None;
                let done = |i: usize, found: Result<&[Face]>| {
                    let part = faces.part(i * capacity, capacity);
                    let result = found.and_then(|found| write(found, &part, &counts.entry(i)));
                    if statuses.len() > 0 {
                        statuses.set(i, result.as_ref().map_or_else(Failure::status, |()| FARFACE_OK));
                    }
                    if let Err(failure) = result {
                        if failed.as_ref().is_none_or(|(first, _)| i < *first) {
                            failed = Some((i, failure));
                        }
                    }
                };
                detect_each(s, images, image_count, done);
                failed.map_or(Ok(()), |(_, failure)| Err(failure))
            })
        };
        if let (Err(failure), false) = (&result, entered) {
            (0..statuses.len()).for_each(|i| statuses.set(i, failure.status()));
        }
        result
    })
}

/// Begins to search a picture on the caller's CUDA stream (a cudaStream_t of the session's device; NULL is CUDA's default stream) and
/// returns without waiting; farface_session_wait() brings the faces. A picture in CUDA memory and the stream must stay in place until
/// then; one in the host's memory is copied before this returns. The faces are lost where another call with the session that searches,
/// warms up or changes settings comes before farface_session_wait().
///
/// Errors: those of farface_detect(); FARFACE_ERROR_UNSUPPORTED with a session on the CPU.
#[no_mangle]
pub unsafe extern "C" fn farface_detect_async(
    session: *mut farface_session,
    image: *const farface_image,
    cuda_stream: *mut c_void,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `session`, `image` and its planes.
        unsafe {
            enter(session, |s| {
                let picture = picture(image)?;
                begin(s, picture, cuda_stream)
            })
        }
    })
}

/// Waits for the picture of farface_detect_async() and writes its faces as farface_detect() does.
///
/// Errors: those of farface_detect(); FARFACE_ERROR_UNSUPPORTED with a session on the CPU.
#[no_mangle]
pub unsafe extern "C" fn farface_session_wait(
    session: *mut farface_session,
    faces: *mut farface_face,
    capacity: usize,
    count: *mut usize,
) -> farface_status {
    guard(|| {
        // SAFETY: the caller's promise about `count`, `faces` and `session`.
        unsafe {
            let count = Out::new(count, "count")?;
            count.set(0);
            let faces = OutSlice::new(faces, capacity, "faces")?;
            enter(session, |s| write(wait(s)?, &faces, &count))
        }
    })
}

/// # Safety
/// `cuda_stream` is NULL or a stream of the session's device, which lives until the picture is waited for.
#[cfg(feature = "cuda")]
unsafe fn begin(session: &mut Session, picture: Picture<'_>, cuda_stream: *mut c_void) -> Result<()> {
    let Some(context) = session.context() else { return Err(no_stream(session)) };
    // SAFETY: the caller's contract.
    let stream = unsafe { foreign_stream(context, cuda_stream) };
    Ok(session.detect_async(source(picture), Some(&stream))?)
}

/// # Safety
/// None; as with the feature `cuda`.
#[cfg(not(feature = "cuda"))]
unsafe fn begin(session: &mut Session, _: Picture<'_>, _: *mut c_void) -> Result<()> {
    Err(no_stream(session))
}

fn wait(session: &mut Session) -> Result<&[Face]> {
    #[cfg(feature = "cuda")]
    if session.context().is_some() {
        return Ok(session.wait()?);
    }
    Err(no_stream(session))
}

fn no_stream(session: &Session) -> Failure {
    Error::Unsupported(format!(
        "this session runs on {}, which has no streams; use farface_detect()",
        session.device()
    ))
    .into()
}

/// Searches pictures and gives what was found to `done`, with the picture's number.
///
/// # Safety
/// As [`picture`], for each of `count` pictures.
unsafe fn detect_each(
    session: &mut Session,
    images: *const farface_image,
    count: usize,
    mut done: impl FnMut(usize, Result<&[Face]>),
) {
    #[cfg(feature = "cuda")]
    if session.context().is_some() {
        let (mut numbers, mut sources) = (Vec::new(), Vec::new());
        for i in 0..count {
            // SAFETY: the caller's contract.
            match unsafe { picture(images.add(i)) } {
                Ok(picture) => {
                    numbers.push(i);
                    sources.push(source(picture));
                }
                Err(failure) => done(i, Err(failure)),
            }
        }
        return session.detect_sources(&sources, |i, found| done(numbers[i], found.map_err(Failure::from)));
    }
    for i in 0..count {
        // SAFETY: the caller's contract.
        let found = unsafe { picture(images.add(i)) }.and_then(|picture| detect_picture(session, picture));
        done(i, found);
    }
}

fn detect_picture<'s>(session: &'s mut Session, picture: Picture<'_>) -> Result<&'s [Face]> {
    Ok(match picture {
        Picture::Host(view) => session.detect(&view)?,
        #[cfg(feature = "cuda")]
        Picture::Cuda(image) => session.detect_on_device(&image)?,
    })
}

#[cfg(feature = "cuda")]
fn source(picture: Picture<'_>) -> Source<'_> {
    match picture {
        Picture::Host(view) => Source::Host(view),
        Picture::Cuda(image) => Source::Device(image),
    }
}

/// # Safety
/// As [`picture`].
unsafe fn detect_one(
    session: &mut Session,
    image: *const farface_image,
    faces: &OutSlice<farface_face>,
    count: &Out<usize>,
) -> Result<()> {
    // SAFETY: the caller's contract.
    let picture = unsafe { picture(image)? };
    write(detect_picture(session, picture)?, faces, count)
}

/// Gives the caller what was found, as much as there is room for.
fn write(found: &[Face], faces: &OutSlice<farface_face>, count: &Out<usize>) -> Result<()> {
    count.set(found.len());
    for (i, face) in found.iter().take(faces.len()).enumerate() {
        faces.set(i, face.into());
    }
    if found.len() > faces.len() {
        return Err(Error::BufferTooSmall { needed: found.len(), capacity: faces.len() }.into());
    }
    Ok(())
}
