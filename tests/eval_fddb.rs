//! The reference evaluator's FDDB figures for S3FD's detections.
#![cfg(feature = "eval")]

mod common;

use farface::eval::fddb::{evaluate, read_roc, Annotations, Detections, PictureSizes};

#[test]
fn s3fd_rates_are_the_reference_evaluators() {
    let Some(fddb) = common::shared().map(|s| s.join("fixtures/fddb")) else { return };
    let annotations = Annotations::read_folds(&fddb.join("FDDB-folds")).unwrap();
    assert_eq!((annotations.by_image.len(), annotations.faces()), (2845, 5171));
    let detections = Detections::read(&fddb.join("s3fd_result.txt.gz")).unwrap();
    let start = std::time::Instant::now();
    let report = evaluate(&annotations, &detections, &PictureSizes::new(), &mut |_, _| {}).unwrap();
    eprintln!("evaluated in {:?}", start.elapsed());

    let discrete = read_roc(&fddb.join("s3fd_DiscROC.txt.gz")).unwrap();
    let continuous = read_roc(&fddb.join("s3fd_ContROC.txt.gz")).unwrap();
    for rate in &report.rates {
        let n = rate.false_positives;
        let reference = (discrete.rate_at(n), continuous.rate_at(n));
        eprintln!("{n}: {:.6} {:.6}, reference {reference:.6?}", rate.discrete, rate.continuous);
        // The pictures' sizes are guessed here, known to the reference.
        assert!((rate.discrete - reference.0).abs() < 0.002);
        assert!((rate.continuous - reference.1).abs() < 0.002);
        if n == 1000 {
            assert_eq!(reference, (0.968478, 0.738887));
        }
    }
}

#[cfg(feature = "cli")]
#[test]
fn curves_are_plotted_beside_the_reference() {
    use farface::eval::plot::roc_svg;
    let Some(fddb) = common::shared().map(|s| s.join("fixtures/fddb")) else { return };
    let annotations = Annotations::read_folds(&fddb.join("FDDB-folds")).unwrap();
    let detections = Detections::read(&fddb.join("s3fd_result.txt.gz")).unwrap();
    let report = evaluate(&annotations, &detections, &PictureSizes::new(), &mut |_, _| {}).unwrap();
    let reference = read_roc(&fddb.join("s3fd_DiscROC.txt.gz")).unwrap();
    let curves = [("here", &report.discrete), ("reference", &reference), ("continuous", &report.continuous)];
    let svg = roc_svg("FDDB, S3FD", &curves, 2000).unwrap();
    assert!(svg.contains("reference  0.976") && svg.contains("here  0.975"));
    if let Some(path) = std::env::var_os("FARFACE_PLOT") {
        std::fs::write(path, svg).unwrap();
    }
}
