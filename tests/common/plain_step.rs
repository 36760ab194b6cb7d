//! A training step by the plain loops, and networks with every kind of unit to hold others to it.

use farface::graph::build::NodeKind;
use farface::graph::init::Rng;
use farface::graph::{exec, Builder, Graph, Weights};
use farface::layers::{Activation, Conv2d, Interpolation, Layer, MaxPool, RoiAlign};
use farface::shape::{Shape, Tensor};

/// Outputs, parameter gradients and running statistics of one training step by plain loops in f64.
pub struct Step {
    pub outputs: Vec<Tensor<f64>>,
    pub grads: Vec<Vec<f64>>,
    pub params: Vec<Vec<f64>>,
}

/// One training step of `graph`.
pub fn plain_step(
    graph: &Graph,
    weights: &Weights,
    inputs: &[Tensor<f64>],
    d_outputs: &[Tensor<f64>],
    frozen: bool,
) -> Step {
    let mut params: Vec<Vec<f64>> = graph
        .params
        .iter()
        .map(|p| weights.get(&p.name, &p.shape).unwrap().iter().map(|&v| v.into()).collect())
        .collect();
    let mut values: Vec<Tensor<f64>> = Vec::new();
    let mut stats = Vec::new();
    let mut fed = inputs.iter();
    for node in &graph.nodes {
        let mut kept = None;
        let value = match &node.kind {
            NodeKind::Input { .. } => fed.next().unwrap().clone(),
            NodeKind::Layer(Layer::BatchNorm(l)) if !frozen => {
                let [s, b, m, v] = [0, 1, 2, 3].map(|i| node.params[i].0);
                let (scale, shift) = (params[s].clone(), params[b].clone());
                let (mut mean, mut var) = (params[m].clone(), params[v].clone());
                let x = &values[node.inputs[0].0];
                let (y, st) = l.forward_train(x, &scale, &shift, &mut mean, &mut var).unwrap();
                (params[m], params[v], kept) = (mean, var, Some(st));
                y
            }
            NodeKind::Layer(layer) => {
                let ins: Vec<_> = node.inputs.iter().map(|i| &values[i.0]).collect();
                let ps: Vec<_> = node.params.iter().map(|p| &params[p.0][..]).collect();
                exec::forward(layer, &ins, &ps).unwrap()
            }
        };
        values.push(value);
        stats.push(kept);
    }
    let mut grads: Vec<Vec<f64>> = params.iter().map(|p| vec![0.0; p.len()]).collect();
    let mut dys: Vec<Tensor<f64>> = values.iter().map(|v| Tensor::zeros(v.shape)).collect();
    for ((_, id), d) in graph.outputs.iter().zip(d_outputs) {
        dys[id.0].data.iter_mut().zip(&d.data).for_each(|(a, b)| *a += b);
    }
    for (i, node) in graph.nodes.iter().enumerate().rev() {
        let NodeKind::Layer(layer) = &node.kind else { continue };
        let dy = dys[i].clone();
        let ins: Vec<_> = node.inputs.iter().map(|i| &values[i.0]).collect();
        let mut dxs: Vec<_> = ins.iter().map(|x| Some(Tensor::zeros(x.shape))).collect();
        if let (Layer::BatchNorm(l), Some(st)) = (layer, &stats[i]) {
            let [s, b] = [node.params[0].0, node.params[1].0];
            let (mut dw, mut db) = (std::mem::take(&mut grads[s]), std::mem::take(&mut grads[b]));
            l.backward_train(ins[0], &params[s], st, &dy, dxs[0].as_mut(), &mut dw, &mut db).unwrap();
            (grads[s], grads[b]) = (dw, db);
        } else {
            let ps: Vec<_> = node.params.iter().map(|p| &params[p.0][..]).collect();
            let mut dps: Vec<_> = node.params.iter().map(|p| grads[p.0].clone()).collect();
            exec::backward(layer, &ins, &ps, &values[i], &dy, &mut dxs, &mut dps).unwrap();
            for (p, d) in node.params.iter().zip(dps) {
                grads[p.0] = d;
            }
        }
        for (id, dx) in node.value_inputs().iter().zip(dxs) {
            dys[id.0].data.iter_mut().zip(dx.unwrap().data).for_each(|(a, b)| *a += b);
        }
    }
    let outputs = graph.outputs.iter().map(|(_, id)| values[id.0].clone()).collect();
    Step { outputs, grads, params }
}

/// A network with every kind of unit, odd sizes and channel counts, maps read several times.
pub fn mixed(rng: &mut Rng) -> Graph {
    let leaky = Activation::LeakyRelu(0.1);
    let [c1, c2, c3] = [1 + rng.below(20), 1 + rng.below(40), 2 + rng.below(30)];
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let bn = |b: &mut Builder, name: &str, x, c, act: Option<Activation>| {
        let y = b.batchnorm(name, x, c);
        act.map_or(y, |a| b.activation(y, a))
    };
    let stem = b.conv("stem", x, Conv2d::new(3, c1, 3).stride(2));
    let stem = bn(&mut b, "stem_bn", stem, c1, Some(leaky));
    let d = b.conv("dw1", stem, Conv2d::depthwise(c1, 3));
    let d = bn(&mut b, "dw1_bn", d, c1, Some(Activation::Relu));
    let p = b.conv("pw1", d, Conv2d::new(c1, c2, 1));
    let p = bn(&mut b, "pw1_bn", p, c2, Some(leaky));
    let d2 = b.conv("dw2", p, Conv2d::depthwise(c2, 3).stride(2));
    let d2 = bn(&mut b, "dw2_bn", d2, c2, None);
    let wide = b.conv("wide", d2, Conv2d::rect(c2, c3, 1, 5).bias());
    let tall = b.conv("tall", d2, Conv2d::new(c2, c3, 3).dilation(2));
    let tall = b.relu(tall);
    let five = b.conv("five", wide, Conv2d::depthwise(c3, 5).bias());
    let both = b.concat(&[tall, five, d2]);
    let lateral = b.conv("lateral", p, Conv2d::new(c2, 2 * c3 + c2, 1));
    let lateral = bn(&mut b, "lateral_bn", lateral, 2 * c3 + c2, Some(leaky));
    let up = b.upsample_to(both, Interpolation::Nearest, lateral);
    let sum = b.add(lateral, up);
    let sum = b.relu(sum);
    let pool = b.max_pool(sum, MaxPool::new(3, 2, 1));
    let smooth = b.upsample_to(pool, Interpolation::Bilinear, sum);
    let merged = b.add(smooth, sum);
    let odd = b.conv("odd", merged, Conv2d::new(2 * c3 + c2, 7, 1).stride(2).bias());
    let gate = b.global_avg_pool(merged);
    let small = b.upsample_to(stem, Interpolation::Bilinear, odd);
    let small = b.max_pool(small, MaxPool { kernel: [3, 2], stride: [2, 3], padding: [0, 1, 2, 0] });
    let small = bn(&mut b, "small_bn", small, c1, Some(leaky));
    let out = b.conv("out", merged, Conv2d::new(2 * c3 + c2, 5, 3).padding([0, 1, 2, 1]).bias());
    let s = b.activation(odd, Activation::Sigmoid);
    b.output("out", out);
    b.output("sigmoid", s);
    b.output("both", both);
    b.output("small", small);
    b.output("gate", gate);
    b.finish()
}

/// Root of the mean squared difference, relative to that of the expected values.
pub fn worst(a: &[f32], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let size = (b.iter().map(|v| v * v).sum::<f64>() / b.len().max(1) as f64).sqrt().max(1e-3);
    let error =
        a.iter().zip(b).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>() / b.len().max(1) as f64;
    error.sqrt() / size
}

/// Two levels that a second phase looks at: through a normalisation and a rectifier, and as they are; a fully connected layer on
/// the bins, and one behind a normalisation; convolutions that both levels share.
pub fn two_phases(rng: &mut Rng) -> Graph {
    let [c1, c2, wide] = [1 + rng.below(20), 1 + rng.below(24), 1 + rng.below(30)];
    let mut b = Builder::new();
    let x = b.input("image", 3);
    let fine = b.conv("fine", x, Conv2d::new(3, c1, 3).stride(2));
    let fine = b.batchnorm("fine_bn", fine, c1);
    let fine = b.relu(fine);
    let coarse = b.conv("coarse", fine, Conv2d::new(c1, c2, 3).stride(2).bias());
    let class = b.conv("class", coarse, Conv2d::new(c2, 2, 1).bias());
    b.output("class", class);
    let align = |output, scale| RoiAlign { output, spatial_scale: scale, sampling_ratio: 2, aligned: true };
    let boxes = b.input("boxes", 5);
    let rois = b.roi_align(fine, boxes, align([3, 4], 0.5));
    let y = b.conv("connected", rois, Conv2d::rect(c1, wide, 3, 4).padding([0; 4]).bias());
    let y = b.relu(y);
    let again = b.conv("again", y, Conv2d::new(wide, 3, 1).bias());
    b.output("again", again);
    let y = b.conv("inner", rois, Conv2d::new(c1, 5, 3));
    let y = b.batchnorm("inner_bn", y, 5);
    let y = b.conv("normal", y, Conv2d::rect(5, 2, 3, 4).padding([0; 4]));
    b.output("normal", y);
    let others = b.input("others", 5);
    let rois = b.roi_align(coarse, others, align([5, 5], 0.25));
    let y = b.conv("shared", rois, Conv2d::new(c2, c2, 3).bias());
    let y = b.conv("shared", y, Conv2d::new(c2, c2, 3).bias());
    let y = b.global_avg_pool(y);
    b.output("mean", y);
    b.finish()
}

/// Boxes on `images` pictures of 40 pixels: inside, across the border, beyond it, of no size; pictures without any.
pub fn boxes(images: usize, count: usize, rng: &mut Rng) -> Tensor {
    let mut data = Vec::new();
    for i in 0..count {
        let [x, y, w, h] = [-12.0, -12.0, 0.0, 0.0].map(|least| rng.range(least, 36.0));
        let x = if i % 7 == 6 { 60.0 } else { x };
        data.extend([
            rng.below(images.div_ceil(2)) as f32,
            x,
            y,
            x + w,
            y + if i % 5 == 4 { 0.0 } else { h },
        ]);
    }
    Tensor { shape: Shape::new(count, 5, 1, 1), data }
}
