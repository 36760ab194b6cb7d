//! What the outputs of a detector's network mean, said as data: what a device decodes by. `Detector::decode` says the same as code.

#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(test)]
mod tests;

/// Where the values of a level's anchors stand in an output's channels: those of anchor i of a cell begin at `first + i * anchor`,
/// `value` channels apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Number of the output, in the graph's order.
    pub output: usize,
    /// Channel of the first anchor's first value.
    pub first: usize,
    /// Channels from an anchor to the next.
    pub anchor: usize,
    /// Channels from a value of an anchor to its next.
    pub value: usize,
}

impl Field {
    /// An output of its own with so many values an anchor, anchor by anchor.
    pub fn whole(output: usize, values: usize) -> Self {
        Self { output, first: 0, anchor: values, value: 1 }
    }
}

/// What a candidate has beside box and score.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Extras {
    /// Nothing.
    #[default]
    None,
    /// Five points, offsets tx, ty to the anchor each, of the box code's first variance.
    Landmarks(Field),
    /// An ellipse, which [`Detector::ellipse`](super::detector::Detector::ellipse) tells from the anchor's offsets and logit.
    Ellipse,
}

/// A level: anchors on the cells of maps of one size, and where the maps speak of them. Candidates come in the order of rows, columns,
/// anchors.
#[derive(Clone, Debug, PartialEq)]
pub struct Head {
    /// Pixels between cells.
    pub stride: usize,
    /// Centre of the first cell on either axis, pixels.
    pub center: f32,
    /// Index in the maps, and width and height in pixels, of the anchors that are asked.
    pub anchors: Vec<(usize, [f32; 2])>,
    /// The face's logit, or where `pair` says so two: background and face, whose softmax is the sigmoid of their difference.
    pub logits: Field,
    /// As above.
    pub pair: bool,
    /// Offsets tx, ty, tw, th.
    pub boxes: Field,
    /// Of centre and size in the box code.
    pub variances: [f32; 2],
    /// Logits of a first step, and what they must pass for the anchor to be looked at.
    pub filter: Option<(Field, f32)>,
    /// Offsets of a first step that move the anchor, of variances 1.
    pub mover: Option<Field>,
    /// How far from its cell's centre a box may reach along an axis; it is cut there. None: anywhere.
    pub reach: Option<f32>,
    /// What else there is.
    pub extras: Extras,
}

impl Head {
    /// All of these anchors on cells that are centred on their pixels: a logit and offsets of variances 1.
    pub fn new(
        stride: usize,
        sizes: impl IntoIterator<Item = [f32; 2]>,
        logits: Field,
        boxes: Field,
    ) -> Self {
        Self {
            stride,
            center: stride as f32 / 2.0,
            anchors: sizes.into_iter().enumerate().collect(),
            logits,
            pair: false,
            boxes,
            variances: [1.0; 2],
            filter: None,
            mover: None,
            reach: None,
            extras: Extras::None,
        }
    }
}
