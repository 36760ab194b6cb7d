//! Exported networks give in ONNX Runtime what they give here.
//!
//! `FARFACE_PYTHON` names an interpreter with numpy, onnx, onnxruntime and safetensors; without it
//! `python3` is tried, and the test is skipped where that lacks them.

#[path = "common/shared.rs"]
mod common;

use farface::detect::config::DetectorConfig;
use farface::detect::{detector::Detector, ModelConfig};
use farface::graph::init::Rng;
use farface::graph::{onnx::to_onnx, run_reference, Builder, Graph, Weights};
use farface::layers::{Activation, Conv2d, ConvTranspose2d, Interpolation, Linear, MaxPool};
use farface::shape::{Shape, Tensor};
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// Every layer that is exported. A linear layer goes on a map of known size.
fn layers(linear: bool) -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let stem = Conv2d { stride: [2, 1], padding: [0, 1, 2, 3], ..Conv2d::rect(3, 8, 3, 5) };
    let x = b.conv("stem", image, stem.bias());
    let x = b.batchnorm("norm", x, 8);
    let x = b.activation(x, Activation::LeakyRelu(0.1));
    let pool = MaxPool { kernel: [3, 2], stride: [2, 2], padding: [1, 0, 1, 1] };
    let pooled = b.max_pool(x, pool);
    let deep = b.conv("deep", pooled, Conv2d::new(8, 8, 3).dilation(2).groups(4));
    let deep = b.relu(deep);
    let near = b.upsample_to(deep, Interpolation::Nearest, x);
    let sum = b.add(x, near);
    let smooth = b.upsample_to(deep, Interpolation::Bilinear, sum);
    let twice = b.upsample(deep, Interpolation::Bilinear, 2);
    let thrice = b.upsample(deep, Interpolation::Nearest, 3);
    let transposed = ConvTranspose2d {
        in_channels: 8,
        out_channels: 4,
        kernel: [4, 5],
        stride: [2, 2],
        padding: [1, 0, 0, 1],
        groups: 2,
        bias: true,
    };
    let up = b.conv_transpose("up", pooled, transposed);
    let up = b.crop(up, twice, 1, 0);
    let joined = b.concat(&[sum, smooth]);
    let runs = b.activation(joined, Activation::Softmax(4));
    let squashed = b.activation(up, Activation::Sigmoid);
    for (name, value) in [("runs", runs), ("up", squashed), ("again", squashed), ("thrice", thrice)] {
        b.output(name, value);
    }
    let mean = b.global_avg_pool(deep);
    b.output("mean", mean);
    if linear {
        let features = 8 * 9 * 23; // of the pooled map of a 33x46 picture
        let fc = b.linear("fc", pooled, Linear { in_features: features, out_features: 5, bias: true });
        b.output("fc", fc);
    }
    b.finish()
}

/// Values in ONNX's order, N, C, H, W.
fn nchw(t: &Tensor) -> Vec<f32> {
    let s = t.shape;
    let mut values = Vec::with_capacity(s.len());
    for n in 0..s.n {
        for c in 0..s.c {
            for y in 0..s.h {
                values.extend((0..s.w).map(|x| t.at(n, c, y, x)));
            }
        }
    }
    values
}

/// Writes the network, of one size or of any, and what it computes at these sizes (height, width).
fn case(folder: &Path, name: &str, graph: &Graph, weights: &Weights, fixed: bool, sizes: &[[usize; 2]]) {
    let file = to_onnx(graph, weights, fixed.then_some(sizes[0])).unwrap();
    std::fs::write(folder.join(format!("{name}.onnx")), file).unwrap();
    let mut rng = Rng::new(5);
    for &[h, w] in sizes {
        let shape = Shape::new(1, 3, h, w);
        let image = Tensor::from_vec(shape, (0..shape.len()).map(|_| rng.normal()).collect());
        let outputs = run_reference(graph, weights, std::slice::from_ref(&image)).unwrap();
        let mut values = Weights::default();
        let named = graph.outputs.iter().map(|(name, _)| name.as_str()).zip(&outputs);
        for (name, t) in named.chain([("input", &image)]) {
            let s = t.shape;
            values.insert(name, &[s.n, s.c, s.h, s.w], nchw(t));
        }
        values.save(folder.join(format!("{name}.{h}x{w}.safetensors"))).unwrap();
    }
}

#[test]
fn onnx_runtime_computes_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, fixed, sizes) in
        [("fixed", true, &[[33, 46]][..]), ("any", false, &[[33, 46], [64, 40], [37, 91]])]
    {
        let graph = layers(fixed);
        case(folder, &format!("layers-{name}"), &graph, &Weights::random(&graph, 1), fixed, sizes);
    }
    for config in [ModelConfig::farface_nano(), ModelConfig::farface_small()] {
        let DetectorConfig::Pyramid(detector) = &config.detector else { panic!("{}", config.name) };
        let graph = detector.graph();
        let weights = Weights::random(&graph, 2);
        case(folder, &config.name, &graph, &weights, true, &[[75, 101]]);
        case(folder, &format!("{}-any", config.name), &graph, &weights, false, &[[75, 101], [96, 64]]);
    }
    if let Some(shared) = common::shared() {
        let weights =
            Weights::load(shared.join("fixtures/retinaface-mobile025/weights.safetensors")).unwrap();
        let DetectorConfig::Retinaface(detector) = ModelConfig::of(&weights).unwrap().detector else {
            panic!("the fixture is RetinaFace")
        };
        case(folder, "retinaface", &detector.graph(), &weights, false, &[[96, 128], [101, 75]]);
    }

    let named = std::env::var_os("FARFACE_PYTHON");
    let python = named.clone().unwrap_or_else(|| "python3".into());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/onnx_check.py");
    let run = Command::new(&python).arg(script).arg(folder).output();
    match run {
        Ok(run) if run.status.success() => println!("{}", String::from_utf8_lossy(&run.stdout)),
        Ok(run) if run.status.code() != Some(77) || named.is_some() => {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            panic!("{}\n{}\n{}", run.status, text(&run.stdout), text(&run.stderr));
        }
        Err(e) if named.is_some() => panic!("FARFACE_PYTHON {}: {e}", python.display()),
        _ => {
            let _ = writeln!(std::io::stderr(), "skipped: python3 with onnx and onnxruntime not found");
        }
    }
}
