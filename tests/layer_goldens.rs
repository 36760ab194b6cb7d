//! Every layer, forward and backward, against PyTorch and torchvision in f32
//! (tests/golden/layers.py makes the values; its cases stand here by the same names).
#![cfg(feature = "train")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use farface::layers::{
    Activation, Add, BatchNorm, Concat, Conv2d, ConvTranspose2d, Crop, GlobalAvgPool, Interpolation, Linear,
    MaxPool, RoiAlign, Upsample, UpsampleTo,
};
use farface::shape::{Shape, Tensor};
use safetensors::SafeTensors;

/// One case: its values by name, with PyTorch's sizes.
struct Case(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

/// The cases of a layer, which must be exactly these.
fn cases<P: Copy>(layer: &str, parameters: &[(&'static str, P)]) -> Vec<(P, Case)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/layers.safetensors");
    let bytes = std::fs::read(&path)
        .unwrap_or_else(|e| panic!("{}: {e}; tests/golden/layers.py makes this file", path.display()));
    let mut found: BTreeMap<String, Case> = BTreeMap::new();
    for (name, view) in SafeTensors::deserialize(&bytes).expect("a safetensors file").iter() {
        let [of, case, value] = name.split('/').collect::<Vec<_>>()[..] else { panic!("name {name}") };
        if of == layer {
            let values =
                view.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let case = found.entry(case.into()).or_insert_with(|| Case(BTreeMap::new()));
            case.0.insert(value.into(), (view.shape().to_vec(), values));
        }
    }
    let names: BTreeSet<&str> = parameters.iter().map(|p| p.0).collect();
    assert_eq!(names, found.keys().map(String::as_str).collect(), "cases of {layer}");
    parameters.iter().map(|&(name, p)| (p, found.remove(name).expect("names compared"))).collect()
}

impl Case {
    /// A map or a batch of vectors, N x C x H x W or R x 5.
    fn tensor(&self, name: &str) -> Tensor<f32> {
        let (shape, values) = &self.0[name];
        match shape[..] {
            [n, c, h, w] => Tensor::from_nchw(Shape::new(n, c, h, w), values),
            [n, c] => Tensor::from_nchw(Shape::new(n, c, 1, 1), values),
            _ => panic!("{name} has shape {shape:?}"),
        }
    }

    /// Values as PyTorch stores them.
    fn param(&self, name: &str) -> &[f32] {
        &self.0[name].1
    }

    fn bias(&self) -> Option<&[f32]> {
        self.0.get("b").map(|b| &b.1[..])
    }

    fn holds(&self, layer: &impl std::fmt::Debug, name: &str, got: &Tensor<f32>) {
        let expected = self.tensor(name);
        assert_eq!(got.shape, expected.shape, "{layer:?} {name}");
        close(layer, name, &got.data, &expected.data);
    }

    fn holds_param(&self, layer: &impl std::fmt::Debug, name: &str, got: &[f32]) {
        close(layer, name, got, self.param(name));
    }
}

fn close(layer: &impl std::fmt::Debug, name: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{layer:?} {name}");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= 1e-5 + 1e-5 * e.abs(), "{layer:?} {name} at {i}: {g}, PyTorch {e}");
    }
}

#[test]
fn conv2d_is_pytorchs() {
    let base = Conv2d::new;
    let parameters = [
        ("1x1", base(3, 4, 1)),
        ("3x3_bias", base(3, 4, 3).bias()),
        ("7x7_stride2", base(3, 4, 7).stride(2)),
        ("dilation", Conv2d { dilation: [2, 3], ..base(2, 3, 3).padding([2, 3, 2, 3]).bias() }),
        ("groups", base(4, 6, 3).groups(2).bias()),
        ("depthwise_stride2", Conv2d::depthwise(4, 3).stride(2)),
        ("1x5", Conv2d::rect(3, 2, 1, 5).bias()),
        ("5x1", Conv2d::rect(3, 2, 5, 1)),
        ("asymmetric", Conv2d { stride: [2, 3], ..Conv2d::rect(2, 3, 3, 2).padding([0, 1, 1, 2]).bias() }),
    ];
    for (conv, case) in cases("conv2d", &parameters) {
        let (x, w, dy) = (case.tensor("x"), case.param("w"), case.tensor("dy"));
        case.holds(&conv, "y", &conv.forward(&x, w, case.bias()).unwrap());
        let (mut dx, mut dw, mut db) =
            (Tensor::zeros(x.shape), vec![0.0; w.len()], vec![0.0; conv.out_channels]);
        let db_or_none = conv.bias.then_some(&mut db[..]);
        conv.backward(&x, w, &dy, Some(&mut dx), &mut dw, db_or_none).unwrap();
        case.holds(&conv, "dx", &dx);
        case.holds_param(&conv, "dw", &dw);
        if conv.bias {
            case.holds_param(&conv, "db", &db);
        }
    }
}

#[test]
fn conv_transpose2d_is_pytorchs() {
    let base = |in_channels, out_channels, kernel, stride, padding| ConvTranspose2d {
        in_channels,
        out_channels,
        kernel,
        stride,
        padding,
        groups: 1,
        bias: false,
    };
    let parameters = [
        ("4x4_stride2", ConvTranspose2d { bias: true, ..base(3, 4, [4, 4], [2, 2], [1; 4]) }),
        ("depthwise", ConvTranspose2d { groups: 3, ..base(3, 3, [4, 4], [2, 2], [1; 4]) }),
        ("groups", ConvTranspose2d { groups: 2, bias: true, ..base(4, 6, [3, 3], [1, 2], [0; 4]) }),
        ("asymmetric", base(2, 2, [3, 5], [2, 3], [1, 2, 0, 1])),
    ];
    for (conv, case) in cases("conv_transpose2d", &parameters) {
        let (x, w, dy) = (case.tensor("x"), case.param("w"), case.tensor("dy"));
        case.holds(&conv, "y", &conv.forward(&x, w, case.bias()).unwrap());
        let (mut dx, mut dw, mut db) =
            (Tensor::zeros(x.shape), vec![0.0; w.len()], vec![0.0; conv.out_channels]);
        let db_or_none = conv.bias.then_some(&mut db[..]);
        conv.backward(&x, w, &dy, Some(&mut dx), &mut dw, db_or_none).unwrap();
        case.holds(&conv, "dx", &dx);
        case.holds_param(&conv, "dw", &dw);
        if conv.bias {
            case.holds_param(&conv, "db", &db);
        }
    }
}

#[test]
fn linear_is_pytorchs() {
    let base = Linear { in_features: 24, out_features: 5, bias: false };
    for (linear, case) in cases("linear", &[("bias", Linear { bias: true, ..base }), ("plain", base)]) {
        let (x, w, dy) = (case.tensor("x"), case.param("w"), case.tensor("dy"));
        case.holds(&linear, "y", &linear.forward(&x, w, case.bias()).unwrap());
        let (mut dx, mut dw, mut db) = (Tensor::zeros(x.shape), vec![0.0; w.len()], vec![0.0; 5]);
        let db_or_none = linear.bias.then_some(&mut db[..]);
        linear.backward(&x, w, &dy, Some(&mut dx), &mut dw, db_or_none).unwrap();
        case.holds(&linear, "dx", &dx);
        case.holds_param(&linear, "dw", &dw);
        if linear.bias {
            case.holds_param(&linear, "db", &db);
        }
    }
}

#[test]
fn batchnorm_is_pytorchs_frozen_and_in_training() {
    let parameters = [
        ("frozen", (false, BatchNorm::new(3))),
        ("frozen_eps", (false, BatchNorm { eps: 1e-2, ..BatchNorm::new(4) })),
        ("train", (true, BatchNorm::new(3))),
        ("train_eps_momentum", (true, BatchNorm { eps: 1e-3, momentum: 0.3, ..BatchNorm::new(4) })),
    ];
    for ((training, bn), case) in cases("batchnorm", &parameters) {
        let (x, w, b, dy) = (case.tensor("x"), case.param("w"), case.param("b"), case.tensor("dy"));
        let (mut mean, mut var) = (case.param("mean").to_vec(), case.param("var").to_vec());
        let (mut dx, mut dw, mut db) = (Tensor::zeros(x.shape), vec![0.0; w.len()], vec![0.0; w.len()]);
        if training {
            let (y, stats) = bn.forward_train(&x, w, b, &mut mean, &mut var).unwrap();
            case.holds(&bn, "y", &y);
            bn.backward_train(&x, w, &stats, &dy, Some(&mut dx), &mut dw, &mut db).unwrap();
        } else {
            case.holds(&bn, "y", &bn.forward(&x, w, b, &mean, &var).unwrap());
            bn.backward(&x, w, &mean, &var, &dy, Some(&mut dx), &mut dw, &mut db).unwrap();
        }
        case.holds_param(&bn, "mean_after", &mean);
        case.holds_param(&bn, "var_after", &var);
        case.holds(&bn, "dx", &dx);
        case.holds_param(&bn, "dw", &dw);
        case.holds_param(&bn, "db", &db);
    }
}

#[test]
fn activations_are_pytorchs() {
    let parameters = [
        ("relu", Activation::Relu),
        ("leaky_relu", Activation::LeakyRelu(0.1)),
        ("sigmoid", Activation::Sigmoid),
        ("softmax2", Activation::Softmax(2)),
        ("softmax3", Activation::Softmax(3)),
    ];
    for (activation, case) in cases("activation", &parameters) {
        let x = case.tensor("x");
        let y = activation.forward(&x).unwrap();
        case.holds(&activation, "y", &y);
        let mut dx = Tensor::zeros(x.shape);
        activation.backward(&y, &case.tensor("dy"), &mut dx).unwrap();
        case.holds(&activation, "dx", &dx);
    }
}

#[test]
fn max_pool_is_pytorchs_in_ties_too() {
    let parameters = [
        ("2x2", MaxPool::new(2, 2, 0)),
        ("3x3_stride2", MaxPool::new(3, 2, 1)),
        ("asymmetric", MaxPool { kernel: [3, 2], stride: [2, 1], padding: [0, 1, 2, 0] }),
        ("3x3_stride1", MaxPool::new(3, 1, 1)),
    ];
    for (pool, case) in cases("max_pool", &parameters) {
        let x = case.tensor("x");
        case.holds(&pool, "y", &pool.forward(&x).unwrap());
        let mut dx = Tensor::zeros(x.shape);
        pool.backward(&x, &case.tensor("dy"), &mut dx).unwrap();
        case.holds(&pool, "dx", &dx);
    }
}

#[test]
fn global_avg_pool_is_pytorchs() {
    for (pool, case) in cases("global_avg_pool", &[("plain", GlobalAvgPool)]) {
        let x = case.tensor("x");
        case.holds(&pool, "y", &pool.forward(&x).unwrap());
        let mut dx = Tensor::zeros(x.shape);
        pool.backward(&case.tensor("dy"), &mut dx).unwrap();
        case.holds(&pool, "dx", &dx);
    }
}

#[test]
fn upsample_is_pytorchs() {
    let by = |mode, y, x| Upsample { mode, to: UpsampleTo::Factor([y, x]) };
    let to_size = |mode| Upsample { mode, to: UpsampleTo::SizeOfSecond };
    let parameters = [
        ("nearest_x2", by(Interpolation::Nearest, 2, 2)),
        ("nearest_x3x1", by(Interpolation::Nearest, 3, 1)),
        ("nearest_7x9", to_size(Interpolation::Nearest)),
        ("nearest_44x46", to_size(Interpolation::Nearest)),
        ("nearest_smaller", to_size(Interpolation::Nearest)),
        ("bilinear_x2", by(Interpolation::Bilinear, 2, 2)),
        ("bilinear_x4x3", by(Interpolation::Bilinear, 4, 3)),
        ("bilinear_7x9", to_size(Interpolation::Bilinear)),
        ("bilinear_smaller", to_size(Interpolation::Bilinear)),
    ];
    for (up, case) in cases("upsample", &parameters) {
        let (x, dy) = (case.tensor("x"), case.tensor("dy"));
        let like = matches!(up.to, UpsampleTo::SizeOfSecond).then_some(dy.shape);
        case.holds(&up, "y", &up.forward(&x, like).unwrap());
        let mut dx = Tensor::zeros(x.shape);
        up.backward(&dy, &mut dx).unwrap();
        case.holds(&up, "dx", &dx);
    }
}

#[test]
fn add_concat_and_crop_are_pytorchs() {
    for (add, case) in cases("add", &[("plain", Add)]) {
        let (a, b) = (case.tensor("a"), case.tensor("b"));
        case.holds(&add, "y", &add.forward(&a, &b).unwrap());
        let (mut da, mut db) = (Tensor::zeros(a.shape), Tensor::zeros(b.shape));
        add.backward(&case.tensor("dy"), Some(&mut da), Some(&mut db)).unwrap();
        case.holds(&add, "da", &da);
        case.holds(&add, "db", &db);
    }
    for (concat, case) in cases("concat", &[("three", Concat)]) {
        let inputs = ["a", "b", "c"].map(|name| case.tensor(name));
        case.holds(&concat, "y", &concat.forward(&inputs.each_ref()).unwrap());
        let mut gradients = inputs.map(|x| Tensor::zeros(x.shape));
        concat.backward(&case.tensor("dy"), &mut gradients.each_mut()).unwrap();
        for (name, gradient) in ["da", "db", "dc"].iter().zip(&gradients) {
            case.holds(&concat, name, gradient);
        }
    }
    for (crop, case) in cases("crop", &[("plain", Crop { top: 1, left: 2 })]) {
        let (x, dy) = (case.tensor("x"), case.tensor("dy"));
        case.holds(&crop, "y", &crop.forward(&x, dy.shape).unwrap());
        let mut dx = Tensor::zeros(x.shape);
        crop.backward(&dy, &mut dx).unwrap();
        case.holds(&crop, "dx", &dx);
    }
}

#[test]
fn roi_align_is_torchvisions() {
    let base = RoiAlign { output: [3, 3], spatial_scale: 0.25, sampling_ratio: 0, aligned: false };
    let parameters = [
        ("adaptive", base),
        ("adaptive_aligned", RoiAlign { output: [3, 2], aligned: true, ..base }),
        ("ratio2", RoiAlign { output: [2, 3], sampling_ratio: 2, ..base }),
        (
            "ratio2_aligned",
            RoiAlign { output: [2, 2], spatial_scale: 0.125, sampling_ratio: 2, aligned: true },
        ),
    ];
    for (roi_align, case) in cases("roi_align", &parameters) {
        let (x, rois) = (case.tensor("x"), case.tensor("rois"));
        case.holds(&roi_align, "y", &roi_align.forward(&x, &rois).unwrap());
        let mut dx = Tensor::zeros(x.shape);
        roi_align.backward(&rois, &case.tensor("dy"), &mut dx).unwrap();
        case.holds(&roi_align, "dx", &dx);
    }
}
