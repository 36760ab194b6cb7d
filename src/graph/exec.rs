//! A network walked layer by layer through the plain loops: the reference that compiled plans are
//! held to, and the forward pass that the trainer's backward pass retraces.

use super::build::{Graph, NodeKind};
use super::weights::Weights;
use crate::error::{Error, Result};
use crate::layers::{Layer, Real, UpsampleTo};
use crate::shape::Tensor;

/// The named outputs of `graph`, in its order, for `inputs` in the order they are fed. Every layer
/// runs its plain `forward`; batch normalisation uses the running statistics. Slow, and right by
/// being plain.
pub fn run_reference<T: Real>(
    graph: &Graph,
    weights: &Weights,
    inputs: &[Tensor<T>],
) -> Result<Vec<Tensor<T>>> {
    let values = run_all(graph, weights, inputs)?;
    Ok(graph.outputs.iter().map(|(_, id)| values[id.0].clone()).collect())
}

/// As [`run_reference`], but the values of all nodes, in the order of [`Graph::nodes`].
pub fn run_all<T: Real>(graph: &Graph, weights: &Weights, inputs: &[Tensor<T>]) -> Result<Vec<Tensor<T>>> {
    let shapes: Vec<_> = inputs.iter().map(|x| x.shape).collect();
    graph.shapes(&shapes)?;
    let params = graph
        .params
        .iter()
        .map(|p| Ok(weights.get(&p.name, &p.shape)?.iter().map(|&v| T::of(v.into())).collect()))
        .collect::<Result<Vec<Vec<T>>>>()?;
    let mut fed = inputs.iter();
    let mut values: Vec<Tensor<T>> = Vec::with_capacity(graph.nodes.len());
    for node in &graph.nodes {
        let value = match &node.kind {
            NodeKind::Input { .. } => fed.next().expect("Graph::shapes has counted the inputs").clone(),
            NodeKind::Layer(layer) => {
                let inputs: Vec<&Tensor<T>> = node.inputs.iter().map(|i| &values[i.0]).collect();
                let params: Vec<&[T]> = node.params.iter().map(|p| &params[p.0][..]).collect();
                forward(layer, &inputs, &params)?
            }
        };
        values.push(value);
    }
    Ok(values)
}

/// One layer's plain forward pass. `inputs` and `params` as the graph's node lists them: the size
/// reference of an upsampling or crop is its second input; parameters are weight and bias, or scale,
/// shift, mean and variance.
pub fn forward<T: Real>(layer: &Layer, inputs: &[&Tensor<T>], params: &[&[T]]) -> Result<Tensor<T>> {
    let wrong = |what: &str| Error::Internal(format!("{} got {what}", layer.kind()));
    let x = *inputs.first().ok_or_else(|| wrong("no input"))?;
    let second = || inputs.get(1).copied().ok_or_else(|| wrong("one input, takes two"));
    let weight = || params.first().copied().ok_or_else(|| wrong("no weight"));
    let bias = params.get(1).copied();
    match layer {
        Layer::Conv2d(l) => l.forward(x, weight()?, bias),
        Layer::ConvTranspose2d(l) => l.forward(x, weight()?, bias),
        Layer::Linear(l) => l.forward(x, weight()?, bias),
        Layer::BatchNorm(l) => match params[..] {
            [scale, shift, mean, variance] => l.forward(x, scale, shift, mean, variance),
            _ => Err(wrong("other than four parameters")),
        },
        Layer::Activation(l) => l.forward(x),
        Layer::MaxPool(l) => l.forward(x),
        Layer::GlobalAvgPool(l) => l.forward(x),
        Layer::Upsample(l) => match l.to {
            UpsampleTo::Factor(_) => l.forward(x, None),
            UpsampleTo::SizeOfSecond => l.forward(x, Some(second()?.shape)),
        },
        Layer::Add(l) => l.forward(x, second()?),
        Layer::Concat(l) => l.forward(inputs),
        Layer::Crop(l) => l.forward(x, second()?.shape),
        Layer::RoiAlign(l) => l.forward(x, second()?),
    }
}

/// One layer's plain backward pass: adds to `dxs` (one an input; None where it is not wanted or only gives a size) and
/// to `dparams` (as `params`). `y` is the output, `dy` its gradient. Batch normalisation uses the running statistics.
#[cfg(feature = "train")]
pub fn backward<T: Real>(
    layer: &Layer,
    inputs: &[&Tensor<T>],
    params: &[&[T]],
    y: &Tensor<T>,
    dy: &Tensor<T>,
    dxs: &mut [Option<Tensor<T>>],
    dparams: &mut [Vec<T>],
) -> Result<()> {
    let wrong = || Error::Internal(format!("{} got other inputs or parameters than it takes", layer.kind()));
    let x = *inputs.first().ok_or_else(wrong)?;
    let (first, rest) = dxs.split_first_mut().ok_or_else(wrong)?;
    let (dw, more) = match dparams.split_first_mut() {
        Some((dw, more)) => (Some(dw), more),
        None => (None, &mut [][..]),
    };
    let weight = || params.first().copied().ok_or_else(wrong);
    match layer {
        Layer::Conv2d(l) => l.backward(
            x,
            weight()?,
            dy,
            first.as_mut(),
            dw.ok_or_else(wrong)?,
            more.first_mut().map(|v| &mut v[..]),
        ),
        Layer::ConvTranspose2d(l) => l.backward(
            x,
            weight()?,
            dy,
            first.as_mut(),
            dw.ok_or_else(wrong)?,
            more.first_mut().map(|v| &mut v[..]),
        ),
        Layer::Linear(l) => l.backward(
            x,
            weight()?,
            dy,
            first.as_mut(),
            dw.ok_or_else(wrong)?,
            more.first_mut().map(|v| &mut v[..]),
        ),
        Layer::BatchNorm(l) => match (params, more) {
            ([scale, _, mean, variance], [db, ..]) => {
                l.backward(x, scale, mean, variance, dy, first.as_mut(), dw.ok_or_else(wrong)?, db)
            }
            _ => Err(wrong()),
        },
        Layer::Add(l) => l.backward(dy, first.as_mut(), rest.first_mut().and_then(Option::as_mut)),
        Layer::Concat(l) => {
            let mut all: Vec<Tensor<T>> = inputs.iter().map(|x| Tensor::zeros(x.shape)).collect();
            l.backward(dy, &mut all.iter_mut().collect::<Vec<_>>())?;
            for (dx, part) in std::iter::once(first).chain(rest).zip(all) {
                if let Some(dx) = dx {
                    dx.data.iter_mut().zip(part.data).for_each(|(to, v)| *to += v);
                }
            }
            Ok(())
        }
        _ => {
            let Some(dx) = first else { return Ok(()) };
            match layer {
                Layer::Activation(l) => l.backward(y, dy, dx),
                Layer::MaxPool(l) => l.backward(x, dy, dx),
                Layer::GlobalAvgPool(l) => l.backward(dy, dx),
                Layer::Upsample(l) => l.backward(dy, dx),
                Layer::Crop(l) => l.backward(dy, dx),
                Layer::RoiAlign(l) => l.backward(inputs.get(1).ok_or_else(wrong)?, dy, dx),
                _ => Err(wrong()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::graph::Builder;
    use crate::layers::{Conv2d, Interpolation};
    use crate::shape::Shape;

    #[test]
    fn layers_run_in_order_in_either_precision() {
        let mut b = Builder::new();
        let x = b.input("x", 1);
        let y = b.conv("double", x, Conv2d::new(1, 1, 1).bias());
        let up = b.upsample(y, Interpolation::Nearest, 2);
        b.output("up", up);
        b.output("y", y);
        let graph = b.finish();
        let mut weights = Weights::default();
        weights.insert("double.weight", &[1, 1, 1, 1], vec![2.0]);
        weights.insert("double.bias", &[1], vec![0.5]);
        let shape = Shape::new(1, 1, 1, 2);
        let single = run_reference(&graph, &weights, &[Tensor::from_nchw(shape, &[1.0f32, -1.0])]).unwrap();
        assert_eq!(single[0].data, [2.5, 2.5, -1.5, -1.5, 2.5, 2.5, -1.5, -1.5]);
        assert_eq!(single[1].data, [2.5, -1.5]);
        let double = run_reference(&graph, &weights, &[Tensor::from_nchw(shape, &[1.0f64, -1.0])]).unwrap();
        assert_eq!(double[1].data, [2.5, -1.5]);
        assert!(run_reference::<f32>(&graph, &weights, &[]).is_err());
        assert!(
            run_reference(&graph, &Weights::default(), &[Tensor::from_vec(shape, vec![0.0f32; 2])]).is_err()
        );
    }
}
