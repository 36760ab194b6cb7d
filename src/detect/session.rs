//! From a picture to faces: a detector at work, on the CPU or a CUDA device.

#[cfg(feature = "cuda")]
use super::device::{OnDevice, Source};
use super::face::Face;
use super::host::{OnHost, MAX_OUTPUTS, SESSION_BYTES};
use super::model::Model;
#[cfg(feature = "cuda")]
use super::options::DevicePolicy;
use super::options::Options;
use super::passes::LevelCost;
use super::timings::Timings;
use crate::error::{Error, Result};
#[cfg(feature = "cuda")]
use crate::gpu::driver::{Context, Stream};
#[cfg(feature = "cuda")]
use crate::pixels::DeviceImage;
use crate::pixels::{ImageView, Size};
#[cfg(feature = "cuda")]
use std::sync::Arc;

/// Where the work is done, and all memory for it.
enum Place {
    Host(Box<OnHost>),
    #[cfg(feature = "cuda")]
    Device(Box<OnDevice>),
}

/// A detector at work: one caller at a time, any number of sessions a model. It owns all memory that a detection needs; on the CPU,
/// detecting at a size that was seen before (or warmed up) allocates nothing.
pub struct Session {
    model: Model,
    options: Options,
    place: Place,
    faces: Vec<Face>,
    timings: Option<Timings>,
}

const _: () = assert!(size_of::<Session>() <= SESSION_BYTES);

impl Session {
    /// Session with the model's own settings, on one thread.
    pub fn new(model: &Model) -> Result<Self> {
        Self::with_options(model, Options::for_model(model.config()))
    }

    /// Session with these settings.
    pub fn with_options(model: &Model, options: Options) -> Result<Self> {
        options.check()?;
        if !(1..=MAX_OUTPUTS).contains(&model.graph().outputs.len()) {
            return Err(Error::InvalidModel(format!("a network has 1 to {MAX_OUTPUTS} outputs")));
        }
        let place = Place::new(model, &options)?;
        Ok(Self { model: model.clone(), options, place, faces: Vec::new(), timings: None })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The settings.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Changes the settings. What was prepared or warmed up is given up where the change concerns it. After an error they are what they
    /// were.
    pub fn set_options(&mut self, options: Options) -> Result<()> {
        options.check()?;
        if options.device != self.options.device {
            self.place = Place::new(&self.model, &options)?;
        } else {
            match &mut self.place {
                Place::Host(host) => {
                    host.set_options(&self.model, &self.options, &options, &mut self.faces)?;
                }
                #[cfg(feature = "cuda")]
                Place::Device(device) => device.set_options(&self.model, &self.options, &options)?,
            }
        }
        self.options = options;
        Ok(())
    }

    /// Name of the device that the network runs on.
    pub fn device(&self) -> &str {
        match &self.place {
            Place::Host(_) => "cpu",
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.name(),
        }
    }

    /// Measures the parts of the following detections.
    pub fn measure(&mut self, on: bool) {
        self.timings = on.then(Timings::default);
    }

    /// Parts of the last detection, where measured.
    pub fn timings(&self) -> Option<Timings> {
        self.timings
    }

    /// Prepares everything for pictures of this upright size (pixels), so that detecting on them
    /// allocates nothing.
    pub fn warmup(&mut self, width: usize, height: usize) -> Result<()> {
        let size = checked_size(width, height)?;
        match &mut self.place {
            Place::Host(host) => host.warmup(&self.model, &self.options, size, &mut self.faces),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.warmup(&self.model, &self.options, size),
        }
    }

    /// Bytes of memory that this session holds once it is warmed up for this upright size and no
    /// other, its threads' stacks not counted.
    pub fn workspace_bytes(&self, width: usize, height: usize) -> Result<u64> {
        let size = checked_size(width, height)?;
        match &self.place {
            Place::Host(host) => host.workspace_bytes(&self.model, &self.options, size),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.workspace_bytes(&self.model, &self.options, size),
        }
    }

    /// The scales on which a picture of this upright size is searched, and what each costs, in the order of the search;
    /// none where no level can hold a face of a size asked for.
    pub fn levels(&self, width: usize, height: usize) -> Result<Vec<LevelCost>> {
        let size = checked_size(width, height)?;
        match &self.place {
            Place::Host(host) => host.levels(&self.model, &self.options, size),
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.levels(&self.model, &self.options, size),
        }
    }

    /// Finds faces, best first, in pixels of the picture as given.
    pub fn detect(&mut self, image: &ImageView<'_>) -> Result<&[Face]> {
        let measured = self.timings.is_some();
        let (model, options, faces) = (&self.model, &self.options, &mut self.faces);
        let timings = match &mut self.place {
            Place::Host(host) => host.detect(model, options, image, measured, faces)?,
            #[cfg(feature = "cuda")]
            Place::Device(device) => device.detect(model, options, Source::Host(*image), faces)?,
        };
        self.timings = measured.then_some(timings);
        Ok(&self.faces)
    }

    /// Finds the faces of pictures of any sizes, as that many calls of [`Session::detect`] would, and gives them to `each` with the
    /// picture's number, in order. On a CUDA device neighbours of one size are searched together.
    pub fn detect_batch(&mut self, images: &[ImageView<'_>], mut each: impl FnMut(usize, Result<&[Face]>)) {
        #[cfg(feature = "cuda")]
        if let Place::Device(_) = &self.place {
            let sources: Vec<Source<'_>> = images.iter().map(|image| Source::Host(*image)).collect();
            return self.detect_sources(&sources, each);
        }
        for (i, image) in images.iter().enumerate() {
            each(i, self.detect(image));
        }
    }

    /// As [`Session::detect_batch`], of pictures in the host's memory or the device's. Parts of it are not timed.
    ///
    /// Errors: [`Error::Unsupported`] for each picture, of a session on the CPU.
    #[cfg(feature = "cuda")]
    pub fn detect_sources(&mut self, images: &[Source<'_>], mut each: impl FnMut(usize, Result<&[Face]>)) {
        let Place::Device(device) = &mut self.place else {
            return (0..images.len()).for_each(|i| each(i, Err(no_device())));
        };
        device.detect_batch(&self.model, &self.options, images, &mut self.faces, &mut each);
    }

    /// As [`Session::detect`], of a picture in the memory of the session's device.
    ///
    /// Errors: [`Error::Unsupported`] of a session on the CPU. A picture whose planes cannot be read there fails the device, for all who
    /// use it in this process.
    #[cfg(feature = "cuda")]
    pub fn detect_on_device(&mut self, image: &DeviceImage) -> Result<&[Face]> {
        let Place::Device(device) = &mut self.place else { return Err(no_device()) };
        let timings = device.detect(&self.model, &self.options, Source::Device(*image), &mut self.faces)?;
        self.timings = self.timings.map(|_| timings);
        Ok(&self.faces)
    }

    /// Begins to search a picture on a stream (the session's own where there is none given) and returns without waiting;
    /// [`Session::wait`] brings the faces. A picture on the device must stay there until then. The faces are lost where another call
    /// with the session that searches, warms up or changes settings comes before.
    ///
    /// Errors: as [`Session::detect_on_device`].
    #[cfg(feature = "cuda")]
    pub fn detect_async(&mut self, image: Source<'_>, stream: Option<&Stream>) -> Result<()> {
        let Place::Device(device) = &mut self.place else { return Err(no_device()) };
        device.detect_async(&self.model, &self.options, image, stream)
    }

    /// Waits for the picture of [`Session::detect_async`].
    ///
    /// Errors: [`Error::InvalidArgument`] where none was begun; else as [`Session::detect_on_device`].
    #[cfg(feature = "cuda")]
    pub fn wait(&mut self) -> Result<&[Face]> {
        let Place::Device(device) = &mut self.place else { return Err(no_device()) };
        if !device.wait(&self.model, &self.options, &mut self.faces)? {
            return Err(Error::InvalidArgument("no picture was begun".into()));
        }
        Ok(&self.faces)
    }

    /// The context of the session's device, of which a caller's streams must be.
    #[cfg(feature = "cuda")]
    pub fn context(&self) -> Option<&Arc<Context>> {
        match &self.place {
            Place::Host(_) => None,
            Place::Device(device) => Some(device.context()),
        }
    }

    /// Finds faces as [`Session::detect`] and writes the best into `faces`. Returns how many there
    /// are, which may be more than there is room for.
    pub fn detect_into(&mut self, image: &ImageView<'_>, faces: &mut [Face]) -> Result<usize> {
        let found = self.detect(image)?;
        let n = found.len().min(faces.len());
        faces[..n].copy_from_slice(&found[..n]);
        Ok(found.len())
    }
}

impl Place {
    /// Where the policy wants it, or where it can be.
    fn new(model: &Model, options: &Options) -> Result<Self> {
        #[cfg(feature = "cuda")]
        {
            let open = |n| OnDevice::new(model, options, n).map(Box::new).map(Self::Device);
            match options.device {
                DevicePolicy::Auto | DevicePolicy::Cpu => {}
                DevicePolicy::RequireCuda(n) => return open(n),
                // What cannot be had is no error; what fails for another reason is.
                DevicePolicy::PreferCuda(n) => match open(n) {
                    Err(Error::Unsupported(_)) => {}
                    other => return other,
                },
            }
        }
        OnHost::new(model, options).map(Box::new).map(Self::Host)
    }
}

#[cfg(feature = "cuda")]
fn no_device() -> Error {
    let text = "this session runs on the CPU, which has no streams and reads no device's memory; copy the picture to the host";
    Error::Unsupported(text.into())
}

fn checked_size(width: usize, height: usize) -> Result<Size> {
    if width == 0 || height == 0 {
        return Err(Error::InvalidArgument(format!("picture of {width}x{height} px")));
    }
    Ok(Size::new(width, height))
}
