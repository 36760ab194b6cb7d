//! The second stage of a detector on a device: the features of every proposal pooled to bins, and the network that looks at them.

use crate::detect::anchors::Anchor;
use crate::detect::boxes::BBox;
use crate::detect::detector::face_probability;
use crate::detect::face::Face;
use crate::detect::heads::cuda;
use crate::detect::model::Model;
use crate::detect::nms::Rule;
use crate::error::{Error, Result};
use crate::gpu::driver::Stream;
use crate::gpu::faces::{Candidate, Settings};
use crate::gpu::map::{Arithmetic, DeviceView, Element};
use crate::gpu::memory::DeviceBuffer;
use crate::gpu::ops::{Device, RoiAlignOp};
use crate::graph::DevicePlan;
use crate::shape::Shape;
use std::sync::Arc;

/// Proposals that pass the second network together.
const TOGETHER: usize = 256;

/// The second stage in a session.
pub(super) struct Second {
    plan: DevicePlan,
    arena: DeviceBuffer,
    align: RoiAlignOp,
    /// Image, x1, y1, x2, y2 of as many proposals.
    boxes: DeviceBuffer,
}

/// What the first stage is asked for: the proposals of a run, where final scores must pass `threshold`.
pub(super) fn settings(model: &Model, threshold: f32, rule: &Rule) -> Settings {
    let (threshold, most) = match model.second_stage() {
        Some(second) => (second.proposal_threshold(threshold), second.stage().max_proposals),
        None => (threshold, usize::MAX),
    };
    cuda::settings(threshold, [0.0; 2], most, rule)
}

impl Second {
    /// That of the model, where it has one, in this arithmetic.
    pub fn new(model: &Model, device: &Arc<Device>, arithmetic: Arithmetic) -> Result<Option<Self>> {
        let Some(second) = model.second_stage() else { return Ok(None) };
        let network = model.second_device_network(device, arithmetic)?;
        let mut plan = DevicePlan::new(&network, &[second.stage().input(TOGETHER)])?;
        plan.choose(&network)?;
        let align = &second.stage().align;
        Ok(Some(Self {
            arena: DeviceBuffer::new(device.context(), plan.bytes())?,
            plan,
            align: RoiAlignOp::new(device, align.spatial_scale, align.sampling_ratio, align.aligned)?,
            boxes: DeviceBuffer::of(device.uploads(), &[0.0f32; 5 * TOGETHER])?,
        }))
    }

    /// Bytes of device memory held.
    pub fn bytes(&self) -> usize {
        self.arena.len() + self.boxes.len()
    }

    /// Runs the network once, on whatever stands there.
    pub fn warmup(&self, stream: &Stream) -> Result<()> {
        self.plan.launch(stream, &self.arena)
    }

    /// Looks at the proposals on the map `features` and gives `sink` those whose final score, the mean of both stages', passes
    /// `threshold`, where the second stage moves them.
    pub fn refine(
        &mut self,
        model: &Model,
        stream: &Stream,
        features: (&DeviceBuffer, &DeviceView),
        proposals: &[Candidate],
        threshold: f32,
        sink: &mut dyn FnMut(Face),
    ) -> Result<()> {
        let second = model.second_stage().ok_or_else(|| Error::Internal("no second stage".into()))?;
        let Self { plan, arena, align, boxes } = self;
        let [Some(logits), Some(offsets)] = plan.outputs() else {
            return Err(Error::Internal("a second stage of other outputs".into()));
        };
        let corners = DeviceView::new(Element::F32, Shape::new(TOGETHER, 5, 1, 1), 0);
        for proposals in proposals.chunks(TOGETHER) {
            let values: Vec<f32> = proposals
                .iter()
                .flat_map(|p| {
                    let [x1, y1, x2, y2] = p.bbox;
                    [0.0, x1, y1, x2, y2]
                })
                .collect();
            boxes.set(stream, 0, &values)?;
            align.run(stream, features, (boxes, &corners), (arena, &plan.inputs()[0]))?;
            plan.launch(stream, arena)?;
            let read =
                |view: &DeviceView| arena.values::<f32>(stream, view.offset, proposals.len() * view.pixel);
            let (all_logits, all_offsets) = (read(logits)?, read(offsets)?);
            for (i, p) in proposals.iter().enumerate() {
                let score = (p.score + face_probability(&all_logits[i * logits.pixel..])) / 2.0;
                // False for a NaN too.
                if score > threshold {
                    let [x1, y1, x2, y2] = p.bbox;
                    let anchor = Anchor::of(&BBox::new(x1, y1, x2, y2));
                    let bbox = anchor.decode(&all_offsets[i * offsets.pixel..], second.stage().variances);
                    sink(Face { bbox, score, ..Face::default() });
                }
            }
        }
        Ok(())
    }
}
