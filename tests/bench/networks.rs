//! The networks that inference is compared on, beside those that have names of their own (`ModelConfig::named`): layouts that
//! other small and large detectors have, with random weights.

use farface::detect::{Model, ModelConfig};
use farface::graph::{Builder, Graph, NodeId, Weights};
use farface::layers::{Activation, Conv2d, Interpolation, MaxPool};
use farface::nets::resnet::{resnet, ResNet};

/// A network by name, or the model of a file, with its weights.
pub fn network(name: &str) -> Result<(Graph, Weights), Box<dyn std::error::Error>> {
    if name.ends_with(".safetensors") {
        let model = Model::load(name)?;
        return Ok((model.graph().clone(), Weights::load(std::path::Path::new(name))?));
    }
    let graph = match name {
        "retinanet-r18" => retinanet(),
        "yunet-like" => yunet_like(),
        "ultra-light-like" => ultra_light_like(),
        _ => {
            let config = ModelConfig::named(name).ok_or_else(|| format!("no network {name:?}"))?;
            config.detector.detector().graph()
        }
    };
    let weights = Weights::random(&graph, 1);
    Ok((graph, weights))
}

fn conv_relu(b: &mut Builder, name: &str, x: NodeId, conv: Conv2d) -> NodeId {
    let x = b.conv(name, x, conv.bias());
    b.activation(x, Activation::Relu)
}

/// RetinaNet (Lin et al. 2017) on ResNet-18, P2 to P7, 256 channels, three anchors a cell.
fn retinanet() -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let net = ResNet::R18;
    let features = resnet(&mut b, image, &net);
    let lateral = |b: &mut Builder, i: usize| {
        b.conv(&format!("lateral{i}"), features[i], Conv2d::new(net.channels()[i], 256, 1).bias())
    };
    let mut sums = [lateral(&mut b, 3); 4];
    for i in (0..3).rev() {
        let own = lateral(&mut b, i);
        let up = b.upsample_to(sums[i + 1], Interpolation::Nearest, own);
        sums[i] = b.add(own, up);
    }
    let mut pyramid: Vec<NodeId> =
        (0..4).map(|i| b.conv(&format!("output{i}"), sums[i], Conv2d::new(256, 256, 3).bias())).collect();
    let p6 = b.conv("p6", features[3], Conv2d::new(512, 256, 3).stride(2).bias());
    let relu = b.activation(p6, Activation::Relu);
    pyramid.extend([p6, b.conv("p7", relu, Conv2d::new(256, 256, 3).stride(2).bias())]);
    for (level, p) in pyramid.into_iter().enumerate() {
        for (name, channels) in [("class", 3), ("box", 12)] {
            let mut x = p;
            for i in 0..4 {
                x = conv_relu(&mut b, &format!("{name}.{i}"), x, Conv2d::new(256, 256, 3));
            }
            let y = b.conv(&format!("{name}.predict"), x, Conv2d::new(256, channels, 3).bias());
            b.output(&format!("{name}{level}"), y);
        }
    }
    b.finish()
}

/// As YuNet-n (Wu et al. 2023): pointwise before depthwise, 64 channels, three levels.
fn yunet_like() -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let mut made = 0;
    let mut unit = |b: &mut Builder, x: NodeId, from: usize, to: usize, relu: bool| {
        made += 1;
        let x = b.conv(&format!("unit{made}.point"), x, Conv2d::new(from, to, 1).bias());
        let x = b.conv(&format!("unit{made}.depth"), x, Conv2d::depthwise(to, 3).bias());
        if relu {
            b.activation(x, Activation::Relu)
        } else {
            x
        }
    };
    let pool = MaxPool::new(2, 2, 0);
    let mut x = conv_relu(&mut b, "stem", image, Conv2d::new(3, 16, 3).stride(2));
    x = unit(&mut b, x, 16, 16, true);
    x = b.max_pool(x, pool);
    let mut features = Vec::new();
    for (i, (from, middle)) in [(16, 16), (64, 64), (64, 64), (64, 64)].into_iter().enumerate() {
        x = unit(&mut b, x, from, middle, true);
        x = unit(&mut b, x, middle, 64, true);
        if i > 0 {
            features.push(x);
        }
        if i < 3 {
            x = b.max_pool(x, pool);
        }
    }
    features[2] = unit(&mut b, features[2], 64, 64, true);
    for i in [1, 0] {
        let up = b.upsample_to(features[i + 1], Interpolation::Nearest, features[i]);
        let sum = b.add(features[i], up);
        features[i] = unit(&mut b, sum, 64, 64, true);
    }
    for (level, p) in features.into_iter().enumerate() {
        let p = unit(&mut b, p, 64, 64, true);
        for (name, channels) in [("class", 1), ("box", 4), ("object", 1), ("points", 10)] {
            let mut y = unit(&mut b, p, 64, channels, false);
            if channels == 1 {
                y = b.activation(y, Activation::Sigmoid);
            }
            b.output(&format!("{name}{level}"), y);
        }
    }
    b.finish()
}

/// As Ultra-Light-Fast-Generic-Face-Detector's slim network: depthwise before pointwise, 16 to 256 channels, four levels.
fn ultra_light_like() -> Graph {
    let mut b = Builder::new();
    let image = b.input("image", 3);
    let mut made = 0;
    let mut unit = |b: &mut Builder, x: NodeId, from: usize, to: usize, stride: usize| {
        made += 1;
        let x = conv_relu(b, &format!("unit{made}.depth"), x, Conv2d::depthwise(from, 3).stride(stride));
        conv_relu(b, &format!("unit{made}.point"), x, Conv2d::new(from, to, 1))
    };
    let mut x = conv_relu(&mut b, "stem", image, Conv2d::new(3, 16, 3).stride(2));
    let units = [
        (16, 32, 1),
        (32, 32, 2),
        (32, 32, 1),
        (32, 64, 2),
        (64, 64, 1),
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
    ];
    let mut features = Vec::new();
    for (i, (from, to, stride)) in units.into_iter().enumerate() {
        x = unit(&mut b, x, from, to, stride);
        if [6, 9, 11].contains(&i) {
            features.push((x, to));
        }
    }
    x = conv_relu(&mut b, "last.reduce", x, Conv2d::new(256, 64, 1));
    x = conv_relu(&mut b, "last.depth", x, Conv2d::depthwise(64, 3).stride(2));
    x = conv_relu(&mut b, "last.point", x, Conv2d::new(64, 256, 1));
    features.push((x, 256));
    for (level, ((p, from), anchors)) in features.into_iter().zip([3, 2, 2, 3]).enumerate() {
        for (name, values) in [("class", 2), ("box", 4)] {
            let y = if level < 3 {
                let y = conv_relu(&mut b, &format!("{name}{level}.depth"), p, Conv2d::depthwise(from, 3));
                b.conv(&format!("{name}{level}.point"), y, Conv2d::new(from, anchors * values, 1).bias())
            } else {
                b.conv(&format!("{name}{level}.conv"), p, Conv2d::new(from, anchors * values, 3).bias())
            };
            b.output(&format!("{name}{level}"), y);
        }
    }
    b.finish()
}
