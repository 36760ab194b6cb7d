//! Every backward pass against central finite differences of its forward pass, in f64, over random
//! shapes and parameters. Inputs keep away from kinks by construction.
#![cfg(feature = "train")]

use farface::layers::{
    Activation, Add, BatchNorm, Concat, Conv2d, ConvTranspose2d, Crop, GlobalAvgPool, Interpolation, Linear,
    MaxPool, RoiAlign, Upsample, UpsampleTo,
};
use farface::shape::{Shape, Tensor};

const STEP: f64 = 1e-5;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Whole number in low..=high.
    fn int(&mut self, low: usize, high: usize) -> usize {
        low + (self.next() % (high - low + 1) as u64) as usize
    }

    /// Number in low..high.
    fn real(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn flip(&mut self) -> bool {
        self.next() & 1 == 0
    }

    fn tensor(&mut self, shape: Shape) -> Tensor<f64> {
        Tensor::from_vec(shape, (0..shape.len()).map(|_| self.real(-1.0, 1.0)).collect())
    }

    /// Parameters, as a tensor 1 x len x 1 x 1.
    fn params(&mut self, len: usize) -> Tensor<f64> {
        self.tensor(Shape::new(1, len, 1, 1))
    }

    /// Values 0.02 apart from each other and 0.01 from zero, in random order: no ties, no kink.
    fn distinct(&mut self, shape: Shape) -> Tensor<f64> {
        let middle = (shape.len() / 2) as f64;
        let mut data: Vec<f64> = (0..shape.len()).map(|i| (i as f64 + 0.5 - middle) * 0.02).collect();
        for i in (1..data.len()).rev() {
            data.swap(i, self.int(0, i));
        }
        Tensor::from_vec(shape, data)
    }

    /// A map of random size.
    fn map(&mut self, c: usize) -> Tensor<f64> {
        let shape = self.shape(c);
        self.tensor(shape)
    }

    fn shape(&mut self, c: usize) -> Shape {
        Shape::new(self.int(1, 2), c, self.int(1, 7), self.int(1, 7))
    }
}

/// Holds the gradients that `backward(values, dy, gradients)` adds for the loss `sum(dy * forward(values))`
/// against central differences in each of the `values`, and holds a second call to double them.
fn check(
    layer: impl std::fmt::Debug,
    rng: &mut Rng,
    mut values: Vec<Tensor<f64>>,
    forward: impl Fn(&[Tensor<f64>]) -> Tensor<f64>,
    backward: impl Fn(&[Tensor<f64>], &Tensor<f64>, &mut [Tensor<f64>]),
) {
    let dy = rng.tensor(forward(&values).shape);
    let loss =
        |values: &[Tensor<f64>]| forward(values).data.iter().zip(&dy.data).map(|(y, d)| y * d).sum::<f64>();

    let mut gradients: Vec<_> = values.iter().map(|v| Tensor::zeros(v.shape)).collect();
    backward(&values, &dy, &mut gradients);
    for k in 0..values.len() {
        for i in 0..values[k].data.len() {
            let v = values[k].data[i];
            values[k].data[i] = v + STEP;
            let above = loss(&values);
            values[k].data[i] = v - STEP;
            let below = loss(&values);
            values[k].data[i] = v;
            let (expected, got) = ((above - below) / (2.0 * STEP), gradients[k].data[i]);
            assert!(
                (got - expected).abs() <= 1e-6 * expected.abs() + 1e-8,
                "{layer:?} {}: gradient of value {k} at {i} is {got}, finite difference {expected}",
                values[0].shape
            );
        }
    }

    let once = gradients.clone();
    backward(&values, &dy, &mut gradients);
    for (twice, once) in gradients.iter().zip(&once) {
        for (t, o) in twice.data.iter().zip(&once.data) {
            assert!((t - 2.0 * o).abs() <= 1e-12 * (1.0 + o.abs()), "{layer:?}: {t} is not twice {o}");
        }
    }
}

#[test]
fn conv2d() {
    let mut rng = Rng(1);
    let kernels = [[1, 1], [3, 3], [1, 5], [5, 1], [2, 3], [4, 2]];
    for case in 0..150 {
        let groups = rng.int(1, 3);
        let per_group = [rng.int(1, 3), rng.int(1, 3)];
        let conv = Conv2d {
            in_channels: groups * per_group[0],
            out_channels: groups * per_group[1],
            kernel: kernels[case % kernels.len()],
            stride: [rng.int(1, 3), rng.int(1, 3)],
            dilation: [rng.int(1, 3), rng.int(1, 3)],
            padding: [0; 4].map(|_| rng.int(0, 3)),
            groups,
            bias: rng.flip(),
        };
        let x = loop {
            let shape = rng.shape(conv.in_channels);
            if conv.out_shape(shape).is_ok() {
                break rng.tensor(shape);
            }
            if conv.window()[0].max(conv.window()[1]) > 7 {
                break rng.tensor(Shape { h: conv.window()[0], w: conv.window()[1], ..shape });
            }
        };
        let mut values = vec![x, rng.params(conv.weight_shape().iter().product())];
        if conv.bias {
            values.push(rng.params(conv.out_channels));
        }
        check(
            conv,
            &mut rng,
            values,
            |v| conv.forward(&v[0], &v[1].data, v.get(2).map(|b| &b.data[..])).unwrap(),
            |v, dy, g| {
                let [dx, dw, db @ ..] = g else { unreachable!() };
                let db = db.first_mut().map(|b| &mut b.data[..]);
                conv.backward(&v[0], &v[1].data, dy, Some(dx), &mut dw.data, db).unwrap();
            },
        );
    }
}

#[test]
fn depthwise_conv2d() {
    let mut rng = Rng(2);
    for kernel in [1, 3, 5] {
        for stride in [1, 2] {
            let conv = Conv2d::depthwise(3, kernel).stride(stride);
            let values = vec![rng.tensor(Shape::new(2, 3, 6, 5)), rng.params(3 * kernel * kernel)];
            check(
                conv,
                &mut rng,
                values,
                |v| conv.forward(&v[0], &v[1].data, None).unwrap(),
                |v, dy, g| {
                    let [dx, dw] = g else { unreachable!() };
                    conv.backward(&v[0], &v[1].data, dy, Some(dx), &mut dw.data, None).unwrap();
                },
            );
        }
    }
}

#[test]
fn conv_transpose2d() {
    let mut rng = Rng(3);
    let kernels = [[1, 1], [4, 4], [1, 5], [5, 1], [2, 3]];
    for case in 0..100 {
        let groups = rng.int(1, 3);
        let per_group = [rng.int(1, 3), rng.int(1, 3)];
        let kernel = kernels[case % kernels.len()];
        let conv = ConvTranspose2d {
            in_channels: groups * per_group[0],
            out_channels: groups * per_group[1],
            kernel,
            stride: [rng.int(1, 3), rng.int(1, 3)],
            // At most the kernel less one in sum on an axis, so that something is left.
            padding: [
                rng.int(0, (kernel[0] - 1) / 2),
                rng.int(0, (kernel[1] - 1) / 2),
                rng.int(0, kernel[0] / 2),
                rng.int(0, kernel[1] / 2),
            ],
            groups,
            bias: rng.flip(),
        };
        let shape = rng.shape(conv.in_channels);
        let mut values = vec![rng.tensor(shape), rng.params(conv.weight_shape().iter().product())];
        if conv.bias {
            values.push(rng.params(conv.out_channels));
        }
        check(
            conv,
            &mut rng,
            values,
            |v| conv.forward(&v[0], &v[1].data, v.get(2).map(|b| &b.data[..])).unwrap(),
            |v, dy, g| {
                let [dx, dw, db @ ..] = g else { unreachable!() };
                let db = db.first_mut().map(|b| &mut b.data[..]);
                conv.backward(&v[0], &v[1].data, dy, Some(dx), &mut dw.data, db).unwrap();
            },
        );
    }
}

#[test]
fn linear() {
    let mut rng = Rng(4);
    for _ in 0..30 {
        let c = rng.int(1, 4);
        let x = rng.shape(c);
        let layer = Linear { in_features: x.c * x.h * x.w, out_features: rng.int(1, 5), bias: rng.flip() };
        let mut values = vec![rng.tensor(x), rng.params(layer.in_features * layer.out_features)];
        if layer.bias {
            values.push(rng.params(layer.out_features));
        }
        check(
            layer,
            &mut rng,
            values,
            |v| layer.forward(&v[0], &v[1].data, v.get(2).map(|b| &b.data[..])).unwrap(),
            |v, dy, g| {
                let [dx, dw, db @ ..] = g else { unreachable!() };
                let db = db.first_mut().map(|b| &mut b.data[..]);
                layer.backward(&v[0], &v[1].data, dy, Some(dx), &mut dw.data, db).unwrap();
            },
        );
    }
}

#[test]
fn batchnorm_with_frozen_statistics() {
    let mut rng = Rng(5);
    for _ in 0..30 {
        let c = rng.int(1, 4);
        let bn = BatchNorm::new(c);
        let x = rng.map(c);
        let values = vec![x, rng.params(c), rng.params(c)];
        let (mean, mut var) = (rng.params(c).data, rng.params(c).data);
        var.iter_mut().for_each(|v| *v = v.abs() + 0.1);
        check(
            bn,
            &mut rng,
            values,
            |v| bn.forward(&v[0], &v[1].data, &v[2].data, &mean, &var).unwrap(),
            |v, dy, g| {
                let [dx, dw, db] = g else { unreachable!() };
                bn.backward(&v[0], &v[1].data, &mean, &var, dy, Some(dx), &mut dw.data, &mut db.data)
                    .unwrap();
            },
        );
    }
}

#[test]
fn batchnorm_with_batch_statistics() {
    let mut rng = Rng(6);
    for _ in 0..30 {
        let c = rng.int(1, 4);
        let bn = BatchNorm::new(c);
        let shape = Shape::new(rng.int(1, 3), c, rng.int(2, 5), rng.int(3, 5));
        // Values apart from each other: the batch's variance is not near zero.
        let values = vec![rng.distinct(shape), rng.params(c), rng.params(c)];
        let forward = |v: &[Tensor<f64>]| {
            let (mut mean, mut var) = (vec![0.0; c], vec![1.0; c]);
            bn.forward_train(&v[0], &v[1].data, &v[2].data, &mut mean, &mut var).unwrap()
        };
        check(
            bn,
            &mut rng,
            values,
            |v| forward(v).0,
            |v, dy, g| {
                let [dx, dw, db] = g else { unreachable!() };
                let stats = forward(v).1;
                bn.backward_train(&v[0], &v[1].data, &stats, dy, Some(dx), &mut dw.data, &mut db.data)
                    .unwrap();
            },
        );
    }
}

#[test]
fn activations() {
    let mut rng = Rng(7);
    for _ in 0..20 {
        for (act, c) in [
            (Activation::Relu, 3),
            (Activation::LeakyRelu(0.0), 2),
            (Activation::LeakyRelu(0.1), 3),
            (Activation::Sigmoid, 3),
            (Activation::Softmax(2), 6),
            (Activation::Softmax(3), 3),
            (Activation::Softmax(1), 2),
        ] {
            let shape = rng.shape(c);
            let x = rng.distinct(shape);
            check(
                act,
                &mut rng,
                vec![x],
                |v| act.forward(&v[0]).unwrap(),
                |v, dy, g| act.backward(&act.forward(&v[0]).unwrap(), dy, &mut g[0]).unwrap(),
            );
        }
    }
}

#[test]
fn max_pool() {
    let mut rng = Rng(8);
    let mut cases = 0;
    while cases < 60 {
        let kernel = [rng.int(1, 4), rng.int(1, 4)];
        let [h, w] = kernel.map(|k| k - 1);
        let pool = MaxPool {
            kernel,
            stride: [rng.int(1, 3), rng.int(1, 3)],
            padding: [rng.int(0, h), rng.int(0, w), rng.int(0, h), rng.int(0, w)],
        };
        let shape = rng.shape(3);
        if pool.out_shape(shape).is_err() {
            continue; // the window does not fit
        }
        cases += 1;
        let x = rng.distinct(shape);
        check(
            pool,
            &mut rng,
            vec![x],
            |v| pool.forward(&v[0]).unwrap(),
            |v, dy, g| pool.backward(&v[0], dy, &mut g[0]).unwrap(),
        );
    }
}

#[test]
fn max_pool_gives_a_tie_to_the_first_in_scan_order() {
    let x = Tensor::from_vec(Shape::new(1, 1, 2, 2), vec![1.0, 2.0, 2.0, 2.0]);
    let mut dx = Tensor::zeros(x.shape);
    let dy = Tensor::from_vec(Shape::new(1, 1, 1, 1), vec![5.0]);
    MaxPool::new(2, 2, 0).backward(&x, &dy, &mut dx).unwrap();
    assert_eq!(dx.data, [0.0, 5.0, 0.0, 0.0]);
}

#[test]
fn global_avg_pool() {
    let mut rng = Rng(9);
    for _ in 0..20 {
        let x = rng.map(3);
        check(
            GlobalAvgPool,
            &mut rng,
            vec![x],
            |v| GlobalAvgPool.forward(&v[0]).unwrap(),
            |_, dy, g| GlobalAvgPool.backward(dy, &mut g[0]).unwrap(),
        );
    }
}

#[test]
fn upsample() {
    let mut rng = Rng(10);
    for mode in [Interpolation::Nearest, Interpolation::Bilinear] {
        for _ in 0..40 {
            let x = rng.shape(2);
            // By a factor, or to any size, smaller ones too.
            let (to, like) = if rng.flip() {
                (UpsampleTo::Factor([rng.int(1, 3), rng.int(1, 3)]), None)
            } else {
                (UpsampleTo::SizeOfSecond, Some(Shape::new(x.n, 5, rng.int(1, 15), rng.int(1, 15))))
            };
            let up = Upsample { mode, to };
            let x = rng.tensor(x);
            check(
                up,
                &mut rng,
                vec![x],
                |v| up.forward(&v[0], like).unwrap(),
                |_, dy, g| up.backward(dy, &mut g[0]).unwrap(),
            );
        }
    }
}

#[test]
fn add_and_concat() {
    let mut rng = Rng(11);
    for _ in 0..10 {
        let s = rng.shape(2);
        let values = vec![rng.tensor(s), rng.tensor(s)];
        check(
            Add,
            &mut rng,
            values,
            |v| Add.forward(&v[0], &v[1]).unwrap(),
            |_, dy, g| {
                let [da, db] = g else { unreachable!() };
                Add.backward(dy, Some(da), Some(db)).unwrap();
            },
        );
        let values: Vec<_> = [2, 1, 4].map(|c| rng.tensor(Shape { c, ..s })).into();
        check(
            Concat,
            &mut rng,
            values,
            |v| Concat.forward(&v.iter().collect::<Vec<_>>()).unwrap(),
            |_, dy, g| Concat.backward(dy, &mut g.iter_mut().collect::<Vec<_>>()).unwrap(),
        );
    }
}

#[test]
fn crop() {
    let mut rng = Rng(12);
    for _ in 0..20 {
        let crop = Crop { top: rng.int(0, 3), left: rng.int(0, 3) };
        let like = rng.shape(4);
        let x = Shape::new(like.n, 2, crop.top + like.h + rng.int(0, 2), crop.left + like.w + rng.int(0, 2));
        let x = rng.tensor(x);
        check(
            crop,
            &mut rng,
            vec![x],
            |v| crop.forward(&v[0], like).unwrap(),
            |_, dy, g| crop.backward(dy, &mut g[0]).unwrap(),
        );
    }
}

#[test]
fn roi_align() {
    let mut rng = Rng(13);
    for _ in 0..40 {
        let roi_align = RoiAlign {
            output: [rng.int(1, 4), rng.int(1, 4)],
            spatial_scale: 0.25,
            sampling_ratio: rng.int(0, 2),
            aligned: rng.flip(),
        };
        let x = rng.map(2);
        // Boxes in, across and beyond the border, and some turned inside out.
        let mut rois = rng.tensor(Shape::new(5, 5, 1, 1));
        for roi in rois.data.chunks_exact_mut(5) {
            roi[0] = rng.int(0, x.shape.n - 1) as f64;
            roi[1..].iter_mut().for_each(|v| *v = 12.0 + 25.0 * *v);
        }
        check(
            roi_align,
            &mut rng,
            vec![x],
            |v| roi_align.forward(&v[0], &rois).unwrap(),
            |_, dy, g| roi_align.backward(&rois, dy, &mut g[0]).unwrap(),
        );
    }
}

/// A layer whose input wants no gradient gives the same parameter gradients.
#[test]
fn parameter_gradients_do_not_depend_on_dx() {
    let mut rng = Rng(14);
    let conv = Conv2d::new(2, 3, 3).bias();
    let up = ConvTranspose2d {
        in_channels: 2,
        out_channels: 3,
        kernel: [3; 2],
        stride: [2; 2],
        padding: [0; 4],
        groups: 1,
        bias: true,
    };
    let linear = Linear { in_features: 32, out_features: 3, bias: true };
    let (x, w) = (rng.tensor(Shape::new(1, 2, 4, 4)), rng.params(54).data);
    let mut dx = Tensor::zeros(x.shape);
    let none: Vec<f64> = vec![0.0; 54];

    let dy = rng.tensor(conv.out_shape(x.shape).unwrap());
    let (mut dw, mut db) = ([none.clone(), none.clone()], [[0.0; 3]; 2]);
    conv.backward(&x, &w, &dy, None, &mut dw[0], Some(&mut db[0])).unwrap();
    conv.backward(&x, &w, &dy, Some(&mut dx), &mut dw[1], Some(&mut db[1])).unwrap();
    assert!(dw[0] == dw[1] && db[0] == db[1] && dw[0] != none);

    let dy = rng.tensor(up.out_shape(x.shape).unwrap());
    let (mut dw, mut db) = ([none.clone(), none.clone()], [[0.0; 3]; 2]);
    up.backward(&x, &w, &dy, None, &mut dw[0], Some(&mut db[0])).unwrap();
    up.backward(&x, &w, &dy, Some(&mut dx), &mut dw[1], Some(&mut db[1])).unwrap();
    assert!(dw[0] == dw[1] && db[0] == db[1] && dw[0] != none);

    let (w, none) = (rng.params(96).data, vec![0.0; 96]);
    let dy = rng.tensor(linear.out_shape(x.shape).unwrap());
    let (mut dw, mut db) = ([none.clone(), none.clone()], [[0.0; 3]; 2]);
    linear.backward(&x, &w, &dy, None, &mut dw[0], Some(&mut db[0])).unwrap();
    linear.backward(&x, &w, &dy, Some(&mut dx), &mut dw[1], Some(&mut db[1])).unwrap();
    assert!(dw[0] == dw[1] && db[0] == db[1] && dw[0] != none);
}

#[test]
fn wrong_sizes_are_errors_that_name_the_culprit() {
    let conv = Conv2d::new(2, 2, 3).bias();
    let x = Tensor::<f64>::zeros(Shape::new(1, 2, 4, 4));
    let (w, b) = ([0.0; 36], [0.0; 2]);
    let text = |r: farface::Result<Tensor<f64>>| r.unwrap_err().to_string();
    assert!(text(conv.forward(&x, &w[1..], Some(&b))).contains("conv2d weight must hold 36 values, got 35"));
    assert!(text(conv.forward(&x, &w, None)).contains("conv2d has a bias, got none"));
    assert!(text(conv.groups(0).forward(&x, &w, Some(&b))).contains("into 0 groups"));
    assert!(text(MaxPool::new(2, 2, 2).forward(&x)).contains("padding"));
    assert!(text(Activation::Softmax(3).forward(&x)).contains("softmax"));

    let up = Upsample { mode: Interpolation::Nearest, to: UpsampleTo::SizeOfSecond };
    assert!(text(up.forward(&x, None)).contains("upsample"));

    let roi_align = RoiAlign { output: [2; 2], spatial_scale: 1.0, sampling_ratio: 0, aligned: true };
    for roi in [[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, f64::NAN, 0.0, 1.0, 1.0], [-1.0, 0.0, 0.0, 1.0, 1.0]] {
        let rois = Tensor::from_vec(Shape::new(1, 5, 1, 1), roi.to_vec());
        assert!(text(roi_align.forward(&x, &rois)).contains("roi_align box"), "{roi:?}");
    }

    let bn = BatchNorm::new(2);
    let one = Tensor::zeros(Shape::new(1, 2, 1, 1));
    let (mut mean, mut var) = (b, b);
    let error = bn.forward_train(&one, &b, &b, &mut mean, &mut var).unwrap_err().to_string();
    assert!(error.contains("two or more values a channel"), "{error}");

    let wrong = Tensor::zeros(Shape::new(1, 2, 4, 5));
    let mut dw = w;
    let error = conv.backward(&x, &w, &wrong, None, &mut dw, Some(&mut [0.0; 2])).unwrap_err().to_string();
    assert!(error.contains("conv2d dy must be 1x2x4x4, got 1x2x4x5"), "{error}");
}
