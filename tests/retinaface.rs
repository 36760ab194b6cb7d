//! The published detector's results, reproduced through the session.

mod common;

use farface::detect::{Face, Model, Options, Session};
use farface::pixels::{ImageView, PixelFormat};
use std::path::Path;

const PICTURES: [(&str, usize); 6] = [
    ("9_Press_Conference_Press_Conference_9_165", 14),
    ("27_Spa_Spa_27_782", 18),
    ("20_Family_Group_Family_Group_20_914", 84),
    ("61_Street_Battle_streetfight_61_432", 159),
    ("11_Meeting_Meeting_11_Meeting_Meeting_11_587", 692),
    ("47_Matador_Bullfighter_matadorbullfighting_47_731", 1276),
];

/// Golden rows x1, y1, x2, y2, score.
fn golden(path: &Path) -> Vec<[f32; 5]> {
    let text = std::fs::read_to_string(path).unwrap();
    let row = |line: &str| -> Option<[f32; 5]> {
        let values: Vec<f32> = line.split(',').map(|v| v.trim().parse().ok()).collect::<Option<_>>()?;
        values.try_into().ok()
    };
    text.lines().filter_map(row).collect()
}

/// Every golden box has exactly one detection within 0.5 px and 1e-4 of score.
fn assert_same(name: &str, faces: &[Face], golden: &[[f32; 5]]) {
    assert_eq!(faces.len(), golden.len(), "{name}: number of boxes");
    let mut free: Vec<&Face> = faces.iter().collect();
    for g in golden {
        let matches = |f: &&Face| {
            let b = f.bbox;
            let corners = [b.x1 - g[0], b.y1 - g[1], b.x2 - g[2], b.y2 - g[3]];
            corners.iter().all(|d| d.abs() < 0.5) && (f.score - g[4]).abs() < 1e-4
        };
        let i = free.iter().position(matches).unwrap_or_else(|| panic!("{name}: nothing matches {g:?}"));
        free.swap_remove(i);
    }
}

#[test]
fn six_pictures_give_the_published_boxes() {
    let Some(shared) = common::shared() else { return };
    let fixture = shared.join("fixtures/retinaface-mobile025");
    let model = Model::load(fixture.join("weights.safetensors")).unwrap();
    let options = Options { score_threshold: 0.02, threads: 2, ..Options::for_model(model.config()) };
    let mut session = Session::with_options(&model, options).unwrap();
    for (name, count) in PICTURES {
        let picture = image::open(fixture.join(format!("golden/{name}.png"))).unwrap().to_rgb8();
        let (w, h) = picture.dimensions();
        let view = ImageView::packed(w as usize, h as usize, PixelFormat::Rgb8, &picture).unwrap();
        let golden = golden(&fixture.join(format!("golden/{name}.csv")));
        assert_eq!(golden.len(), count, "{name}: golden file");
        assert_same(name, session.detect(&view).unwrap(), &golden);
    }
}
