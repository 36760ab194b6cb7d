//! Maps of images in a device's memory, and the struct of them that kernels take.

use crate::shape::Shape;

/// What a map's elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Element {
    /// Single precision.
    F32 = 0,
    /// IEEE half precision.
    F16 = 1,
    /// The upper half of single precision.
    Bf16 = 2,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::F16 | Element::Bf16 => 2,
        }
    }

    /// Elements of sixteen bytes.
    pub fn vector(self) -> usize {
        16 / self.bytes()
    }

    /// Bytes of `values` in this type, to the nearest; f16 ends at its largest number.
    pub fn encode(self, values: impl Iterator<Item = f32>) -> Vec<u8> {
        match self {
            Element::F32 => values.flat_map(f32::to_le_bytes).collect(),
            Element::F16 => {
                let most = half::f16::MAX.to_f32();
                let clamp = |v: f32| if v.is_nan() { v } else { v.clamp(-most, most) };
                values.flat_map(|v| half::f16::from_f32(clamp(v)).to_le_bytes()).collect()
            }
            Element::Bf16 => values.flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        }
    }

    /// The values that such bytes hold.
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        let pairs = || bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self {
            Element::F32 => {
                bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            Element::F16 => pairs().map(|b| half::f16::from_le_bytes(b).to_f32()).collect(),
            Element::Bf16 => pairs().map(|b| half::bf16::from_le_bytes(b).to_f32()).collect(),
        }
    }
}

/// How convolutions multiply, and with it the type of the maps between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arithmetic {
    /// Maps of f32, products of f32.
    F32,
    /// Maps of f32, factors rounded to TF32 (ten bits behind the point, as f16; the exponents of f32), sums of f32.
    Tf32,
    /// Maps of f16, sums of f32.
    F16,
    /// Maps of bf16, sums of f32.
    Bf16,
}

impl Arithmetic {
    /// Type of the maps between steps.
    pub fn element(self) -> Element {
        match self {
            Arithmetic::F32 | Arithmetic::Tf32 => Element::F32,
            Arithmetic::F16 => Element::F16,
            Arithmetic::Bf16 => Element::Bf16,
        }
    }
}

impl From<Element> for Arithmetic {
    /// Maps of this type, their elements multiplied as they are.
    fn from(element: Element) -> Self {
        match element {
            Element::F32 => Arithmetic::F32,
            Element::F16 => Arithmetic::F16,
            Element::Bf16 => Arithmetic::Bf16,
        }
    }
}

/// A map in an arena, channels last. Strides are elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceView {
    /// Type of its elements.
    pub element: Element,
    /// Size.
    pub shape: Shape,
    /// Its first byte, counted from the arena's.
    pub offset: usize,
    /// From a pixel to the next.
    pub pixel: usize,
    /// Elements behind the channels of every pixel that hold zeros and are written with it.
    pub tail: usize,
}

impl DeviceView {
    /// A map of its own at `offset`, whose pixels begin at multiples of sixteen bytes, but of f32 lie close together, as those read
    /// them who are no convolutions.
    pub fn new(element: Element, shape: Shape, offset: usize) -> Self {
        match element {
            Element::F32 => Self { element, shape, offset, pixel: shape.c, tail: 0 },
            Element::F16 | Element::Bf16 => Self::padded(element, shape, offset),
        }
    }

    /// As [`DeviceView::new`], pixels of f32 too at multiples of sixteen bytes.
    pub fn padded(element: Element, shape: Shape, offset: usize) -> Self {
        let pixel = shape.c.next_multiple_of(element.vector());
        Self { element, shape, offset, pixel, tail: pixel - shape.c }
    }

    /// `count` channels of it from `first` on.
    pub fn channels(&self, first: usize, count: usize) -> Self {
        let last = first + count == self.shape.c;
        Self {
            shape: Shape { c: count, ..self.shape },
            offset: self.offset + first * self.element.bytes(),
            tail: if last { self.tail } else { 0 },
            ..*self
        }
    }

    /// Bytes of a map of its own.
    pub fn bytes(&self) -> Option<usize> {
        let Shape { n, h, w, .. } = self.shape;
        n.checked_mul(h)?.checked_mul(w)?.checked_mul(self.pixel)?.checked_mul(self.element.bytes())
    }

    /// As kernels take it, in an arena at this address.
    pub fn at(&self, arena: u64) -> Map {
        let Shape { n, c, h, w } = self.shape;
        let row = w * self.pixel;
        Map {
            data: arena + self.offset as u64,
            image: (h * row) as i64,
            row: row as i64,
            pixel: self.pixel as i64,
            n: n as i32,
            h: h as i32,
            w: w as i32,
            c: c as i32,
            element: self.element as i32,
            tail: self.tail as i32,
        }
    }

    /// Whether every pixel begins at a multiple of sixteen bytes and its channels with the tail are whole vectors: channels
    /// behind its own are read too, and another map's values must not meet the weights' zeros.
    pub fn is_whole_vectors(&self) -> bool {
        self.is_aligned() && self.shape.c.next_multiple_of(self.element.vector()) == self.shape.c + self.tail
    }

    /// Whether every pixel begins at a multiple of sixteen bytes.
    pub fn is_aligned(&self) -> bool {
        self.offset.is_multiple_of(16) && (self.pixel * self.element.bytes()).is_multiple_of(16)
    }
}

/// `Map` of `cuda/common.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Map {
    /// Address of the first element.
    pub data: u64,
    /// Elements from image to image, from row to row, from pixel to pixel.
    pub image: i64,
    /// As above.
    pub row: i64,
    /// As above.
    pub pixel: i64,
    /// Images.
    pub n: i32,
    /// Rows.
    pub h: i32,
    /// Columns.
    pub w: i32,
    /// Channels.
    pub c: i32,
    /// An [`Element`].
    pub element: i32,
    /// As [`DeviceView::tail`].
    pub tail: i32,
}
