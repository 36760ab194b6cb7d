//! The same batches at any number of workers, from any step.

use super::*;
use crate::detect::BBox;
use crate::train::data::{Sample, WarningKind, Warnings};
use std::path::Path;
use std::time::{Duration, Instant};

fn dataset(dir: &Path, count: usize) -> Arc<Dataset> {
    let mut samples = Vec::new();
    for i in 0..count {
        let path = dir.join(format!("{i}.png"));
        image::RgbImage::from_fn(60, 40, |x, y| image::Rgb([(x * 4) as u8, (y * 6) as u8, i as u8 * 9]))
            .save(&path)
            .unwrap();
        let bbox = BBox::new(10.0 + i as f32, 10.0, 25.0 + i as f32, 28.0);
        samples.push(Sample { path, name: i.to_string(), faces: vec![Annotated { bbox, ignore: false }] });
    }
    Arc::new(Dataset { samples, warnings: Warnings::default() })
}

fn config() -> LoaderConfig {
    LoaderConfig {
        seed: 5,
        batch: 3,
        part: 0..3,
        side: Sides::by_step(|step| if step % 2 == 0 { 32 } else { 24 }),
        workers: 1,
        queue: 3,
        cache_bytes: 1 << 20,
        start_step: 0,
    }
}

fn batches(data: &Arc<Dataset>, config: LoaderConfig, count: usize) -> Vec<Batch> {
    let loader = Loader::new(data.clone(), Augment::default(), config).unwrap();
    (0..count).map(|_| loader.next().unwrap()).collect()
}

#[test]
fn batches_are_the_same_at_any_number_of_workers_queue_and_cache() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 7);
    let reference = batches(&data, config(), 9);
    for (i, batch) in reference.iter().enumerate() {
        assert_eq!((batch.step, batch.side), (i as u64, [32, 24][i % 2]));
        assert_eq!(batch.pixels.len(), 3 * batch.side * batch.side * 3);
        assert_eq!((batch.faces.len(), batch.names.len()), (3, 3));
    }
    for workers in 2..=4 {
        assert!(batches(&data, LoaderConfig { workers, ..config() }, 9) == reference, "{workers} workers");
    }
    assert!(
        batches(&data, LoaderConfig { queue: 1, cache_bytes: 0, workers: 2, ..config() }, 9) == reference
    );
    assert!(batches(&data, LoaderConfig { seed: 6, ..config() }, 9) != reference);
}

#[test]
fn the_parts_of_a_batch_are_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 7);
    let whole = batches(&data, config(), 5);
    for part in [0..1, 1..3] {
        let own = batches(&data, LoaderConfig { part: part.clone(), workers: 2, ..config() }, 5);
        for (own, whole) in own.iter().zip(&whole) {
            let image = whole.side * whole.side * 3;
            assert_eq!((own.step, own.side), (whole.step, whole.side));
            assert!(own.pixels == whole.pixels[image * part.start..image * part.end]);
            assert_eq!(
                (&own.faces[..], &own.names[..]),
                (&whole.faces[part.clone()], &whole.names[part.clone()])
            );
            assert_eq!(own.inside, whole.inside[part.clone()]);
        }
    }
}

#[test]
fn resuming_in_the_middle_gives_the_batches_of_the_whole_run() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 7);
    let whole = batches(&data, config(), 9);
    let rest = batches(&data, LoaderConfig { start_step: 5, workers: 2, ..config() }, 4);
    assert!(whole[5..] == rest);
}

#[test]
fn an_epoch_shows_every_sample_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 9);
    let all = batches(&data, config(), 6);
    for epoch in all.chunks(3) {
        let mut names: Vec<&String> = epoch.iter().flat_map(|b| &b.names).collect();
        names.sort();
        assert!(names.iter().map(|n| n.parse::<usize>().unwrap()).eq(0..9), "{names:?}");
    }
    let loader = Loader::new(data, Augment::default(), config()).unwrap();
    assert_eq!([0, 2, 3, 6].map(|step| loader.epoch(step)), [0, 0, 1, 2]);
}

#[test]
fn recycled_memory_does_not_show() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 7);
    let reference = batches(&data, config(), 9);
    let loader = Loader::new(data, Augment::default(), LoaderConfig { workers: 2, ..config() }).unwrap();
    for expected in reference {
        let mut batch = loader.next().unwrap();
        assert!(batch == expected);
        batch.pixels.fill(77);
        loader.recycle(batch);
    }
}

#[test]
fn an_undecodable_sample_is_replaced_by_the_next_and_counted_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 5);
    std::fs::write(&data.samples[2].path, "damaged").unwrap();
    let reference = batches(&data, config(), 10);
    assert_eq!(data.warnings.count(WarningKind::UndecodablePicture), 1);
    assert_eq!(data.warnings.names(WarningKind::UndecodablePicture), ["2"]);
    let names: Vec<&String> = reference.iter().flat_map(|b| &b.names).collect();
    let times = |name: &str| names.iter().filter(|n| **n == name).count();
    assert_eq!(["0", "1", "2", "3", "4"].map(times), [6, 6, 0, 12, 6]);
    assert!(batches(&data, LoaderConfig { workers: 3, ..config() }, 10) == reference);
}

#[test]
fn without_a_decodable_picture_next_fails_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 2);
    data.samples.iter().for_each(|s| std::fs::write(&s.path, "damaged").unwrap());
    let loader = Loader::new(data, Augment::default(), LoaderConfig { workers: 2, ..config() }).unwrap();
    for _ in 0..2 {
        let error = loader.next().unwrap_err().to_string();
        assert!(error.contains("none of the 2 pictures can be decoded"), "{error}");
    }
}

#[test]
fn a_panic_in_a_worker_is_an_error_not_a_hang() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 4);
    let side = Sides::by_step(|step| if step == 1 { panic!("no side for this step") } else { 16 });
    let loader =
        Loader::new(data, Augment::default(), LoaderConfig { side, workers: 2, ..config() }).unwrap();
    assert_eq!(loader.next().unwrap().step, 0);
    for _ in 0..2 {
        let error = loader.next().unwrap_err().to_string();
        assert!(error.contains("no side for this step"), "{error}");
    }
}

#[test]
fn no_more_batches_are_made_than_the_queue_holds() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 4);
    let made = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let seen = made.clone();
    // The side is asked for once a batch.
    let side = Sides::by_step(move |_| {
        seen.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        16
    });
    let count = || made.load(std::sync::atomic::Ordering::SeqCst);
    let wait_for = |n| {
        let start = Instant::now();
        while count() < n && start.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(count(), n);
    };
    let loader =
        Loader::new(data, Augment::default(), LoaderConfig { side, workers: 4, ..config() }).unwrap();
    wait_for(3);
    loader.next().unwrap();
    wait_for(4);
}

#[test]
fn the_cache_stays_within_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 6);
    let (one, workers) = (60 * 40 * 3, 3);
    for (cache_bytes, kept) in [(0, 0), (2 * one + 1, 2 * one), (100 * one, 6 * one)] {
        let config = LoaderConfig { cache_bytes, workers, ..config() };
        let loader = Loader::new(data.clone(), Augment::default(), config).unwrap();
        (0..4).for_each(|_| drop(loader.next().unwrap()));
        assert_eq!(loader.cached_bytes(), kept);
    }
}

#[test]
fn dropping_the_loader_stops_workers_within_an_example() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 4);
    let config =
        LoaderConfig { batch: 100_000, part: 0..100_000, side: 16.into(), workers: 2, queue: 4, ..config() };
    let loader = Loader::new(data.clone(), Augment::default(), config).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    let start = Instant::now();
    drop(loader);
    assert!(start.elapsed() < Duration::from_secs(3));
    // Workers hold the data set; none is left.
    assert_eq!(Arc::strong_count(&data), 1);
}

#[test]
fn counts_of_zero_and_empty_data_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(dir.path(), 1);
    let fails = |data: &Arc<Dataset>, augment: Augment, config: LoaderConfig| {
        Loader::new(data.clone(), augment, config).err().expect("refused").to_string()
    };
    assert!(fails(&data, Augment::default(), LoaderConfig { batch: 0, ..config() }).contains("batch"));
    assert!(fails(&data, Augment::default(), LoaderConfig { workers: 0, ..config() }).contains("workers"));
    assert!(fails(&data, Augment::default(), LoaderConfig { queue: 0, ..config() }).contains("queue"));
    assert!(fails(&data, Augment::default(), LoaderConfig { part: 2..4, ..config() }).contains("part 2..4"));
    assert!(fails(&data, Augment::default(), LoaderConfig { part: 1..1, ..config() }).contains("part"));
    assert!(fails(&data, Augment { flip: 2.0, ..Augment::default() }, config()).contains("flip"));
    assert!(fails(&Arc::default(), Augment::default(), config()).contains("no pictures"));
    let loader = Loader::new(data, Augment::default(), LoaderConfig { side: 0.into(), ..config() }).unwrap();
    assert!(loader.next().unwrap_err().to_string().contains("side"));
}
