//! Readers and what they skip.

use super::*;
use image::{ImageFormat, RgbImage};

fn picture_file(path: &Path, width: u32, height: u32) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    RgbImage::from_fn(width, height, |x, y| image::Rgb([x as u8, y as u8, 7])).save(path).unwrap();
}

fn text_file(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn source(json: &str) -> Source {
    serde_json::from_str(json).unwrap()
}

fn boxes(sample: &Sample) -> Vec<([f32; 4], bool)> {
    sample.faces.iter().map(|f| ([f.bbox.x1, f.bbox.y1, f.bbox.x2, f.bbox.y2], f.ignore)).collect()
}

#[test]
fn wider_lists_find_pictures_of_any_extension_and_ignore_invalid_faces() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    picture_file(&at("images/0--Parade/a.png"), 100, 80);
    picture_file(&at("images/0--Parade/b.webp"), 100, 80);
    text_file(
        &at("train.txt"),
        "0--Parade/a.jpg\n2\n10 20 30 40 0 0 0 0 0 0\n90 70 30 40 0 0 0 1 0 0\n0--Parade/b.jpg\n0\n0 0 0 0 0 0 0 0 0 0\n",
    );
    let wider = source(r#"{"kind": "wider", "list": "train.txt", "images": "images"}"#);
    let data = Dataset::load(&[wider], dir.path()).unwrap();
    assert!(data.warnings.is_empty(), "{}", data.warnings);
    assert_eq!(
        boxes(&data.samples[0]),
        [([10.0, 20.0, 40.0, 60.0], false), ([90.0, 70.0, 100.0, 80.0], true)]
    );
    assert_eq!(data.samples[0].path, at("images/0--Parade/a.png"));
    assert_eq!((data.samples.len(), data.samples[1].faces.len(), data.faces()), (2, 0, 1));
}

#[test]
fn wider_mat_files_are_read() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fixtures/wider/wider_face_val.mat");
    if !fixture.exists() {
        eprintln!("skipped: ../shared not found");
        return;
    }
    let listed = wider::read(&fixture, Path::new("images")).unwrap();
    assert_eq!(listed.len(), 3226);
    assert!(listed.iter().any(|l| l.faces.iter().any(|f| f.ignore)));
    assert!(listed[0].path.starts_with("images") && !listed[0].faces.is_empty());
}

#[test]
fn plain_lists_take_paths_with_blanks_and_pictures_without_faces() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for name in ["p/a.png", "p/my photo.png", "p/c.png"] {
        picture_file(&at(name), 60, 50);
    }
    text_file(&at("list.txt"), "p/a.png 1 2 3 4\np/my photo.png 5 6 7.5 8\np/c.png\np/a.png 9 9 9 9\n");
    let data = Dataset::load(&[source(r#"{"kind": "list", "list": "list.txt"}"#)], dir.path()).unwrap();
    let names: Vec<&str> = data.samples.iter().map(|s| s.name.as_str()).collect();
    assert_eq!(names, ["p/a.png", "p/my photo.png", "p/c.png"]);
    assert_eq!(boxes(&data.samples[0]), [([1.0, 2.0, 4.0, 6.0], false), ([9.0, 9.0, 18.0, 18.0], false)]);
    assert_eq!(boxes(&data.samples[1]), [([5.0, 6.0, 12.5, 14.0], false)]);
    assert!(data.samples[2].faces.is_empty());

    for bad in ["p/a.png 1 2 3", "p/a.png 1 2 nan 4", "p/a.png 7"] {
        text_file(&at("bad.txt"), &format!("p/c.png\n{bad}\n"));
        let error =
            Dataset::load(&[source(r#"{"kind": "list", "list": "bad.txt"}"#)], dir.path()).unwrap_err();
        assert!(error.to_string().contains("bad.txt:2"), "{bad}: {error}");
    }
}

#[test]
fn yolo_folders_scale_by_the_pictures_size() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    picture_file(&at("images/x/a.png"), 200, 100);
    picture_file(&at("images/b.bmp"), 64, 64);
    text_file(&at("labels/x/a.txt"), "0 0.5 0.5 0.2 0.4\n3 0.1 0.1 0.1 0.1\n");
    text_file(&at("labels/gone.txt"), "0 0.5 0.5 0.2 0.4\n");
    text_file(&at("labels/classes.txt"), "face\n");
    let load = |more: &str| {
        let json = format!(r#"{{"kind": "yolo", "images": "images", "labels": "labels"{more}}}"#);
        Dataset::load(&[source(&json)], dir.path())
    };
    let data = load(r#", "classes": [0]"#).unwrap();
    assert_eq!(data.samples.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["b.bmp", "x/a.png"]);
    assert!(data.samples[0].faces.is_empty());
    let b = data.samples[1].faces[0].bbox;
    for (a, b) in [b.x1, b.y1, b.x2, b.y2].into_iter().zip([80.0, 30.0, 120.0, 70.0]) {
        assert!((a - b).abs() < 1e-3);
    }
    assert_eq!(data.samples[1].faces.len(), 1);
    assert_eq!(load("").unwrap().samples[1].faces.len(), 2);
    assert_eq!(data.warnings.count(WarningKind::UnusedLabels), 1);
    assert!(data.warnings.names(WarningKind::UnusedLabels)[0].ends_with("gone.txt"));

    text_file(&at("labels/b.txt"), "0 0.5 0.5 0.2\n");
    assert!(load("").unwrap_err().to_string().contains("b.txt:1"));
}

#[test]
fn voc_folders_count_pixels_from_one_and_ignore_difficult_objects() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    picture_file(&at("JPEGImages/a.png"), 100, 100);
    let object = |name: &str, difficult: &str| {
        format!(
            "<object><name>{name}</name>{difficult}<part><bndbox><xmin>1</xmin></bndbox></part>\
             <bndbox><xmin>11</xmin><ymin>21</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>"
        )
    };
    let xml = |objects: &str| {
        format!("<?xml version=\"1.0\"?><annotation><filename>a.jpg</filename>{objects}</annotation>")
    };
    let hard = "<difficult>1</difficult>";
    text_file(
        &at("Annotations/a.xml"),
        &xml(&[object("face", ""), object("face", hard), object("dog", "")].concat()),
    );
    let load = |more: &str| {
        let json =
            format!(r#"{{"kind": "voc", "annotations": "Annotations", "images": "JPEGImages"{more}}}"#);
        Dataset::load(&[source(&json)], dir.path())
    };
    let data = load(r#", "classes": ["face"]"#).unwrap();
    let b = [10.0, 20.0, 30.0, 40.0];
    assert_eq!(boxes(&data.samples[0]), [(b, false), (b, true)]);
    assert_eq!(load("").unwrap().samples[0].faces.len(), 3);

    for bad in
        [xml("<object><name>face</name></object>"), xml(&object("face", "")).replace("30", "x"), "<a>".into()]
    {
        text_file(&at("Annotations/a.xml"), &bad);
        let error = load("").unwrap_err();
        assert!(matches!(error, Error::InvalidData(_)) && error.to_string().contains("a.xml"), "{error}");
    }
}

#[test]
fn bad_pictures_and_boxes_are_skipped_counted_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    picture_file(&at("good.png"), 50, 40);
    text_file(&at("text.png"), "not a picture");
    text_file(&at("empty.jpg"), "");
    text_file(
        &at("list.txt"),
        "good.png 10 10 0 5\ngood.png 10 10 5 -1\ngood.png 50 3 9 9\ngood.png -9 -9 9 20\ngood.png -5 -5 100 100\n\
         gone.png 1 1 1 1\ntext.png 1 1 1 1\nempty.jpg\n",
    );
    let list = source(r#"{"kind": "list", "list": "list.txt"}"#);
    let data = Dataset::load(&[list], dir.path()).unwrap();
    assert_eq!(data.samples.len(), 1);
    assert_eq!(boxes(&data.samples[0]), [([0.0, 0.0, 50.0, 40.0], false)]);
    let counts = [
        (WarningKind::MissingPicture, 1),
        (WarningKind::UndecodablePicture, 2),
        (WarningKind::EmptyBox, 2),
        (WarningKind::OutsideBox, 2),
    ];
    for (kind, count) in counts {
        assert_eq!(data.warnings.count(kind), count, "{kind:?}");
    }
    assert_eq!(
        data.warnings.to_string(),
        "skipped 1 missing pictures (gone.png); 2 undecodable pictures (text.png, empty.jpg); \
         2 boxes without size (good.png, ..); 2 boxes outside their picture (good.png, ..)"
    );
}

#[test]
fn a_source_without_pictures_is_an_error_that_says_what_was_skipped() {
    let dir = tempfile::tempdir().unwrap();
    text_file(&dir.path().join("list.txt"), "gone.png 1 1 1 1\n");
    let list = source(r#"{"kind": "list", "list": "list.txt"}"#);
    let error = Dataset::load(&[list], dir.path()).unwrap_err().to_string();
    assert!(error.contains("gone.png") && error.contains("check the paths"), "{error}");
    let missing = source(r#"{"kind": "wider", "list": "none.txt", "images": "."}"#);
    assert!(matches!(Dataset::load(&[missing], dir.path()), Err(Error::Io { .. })));
}

#[test]
fn unknown_kinds_and_fields_of_a_source_are_refused() {
    for bad in [
        r#"{"kind": "coco", "list": "a"}"#,
        r#"{"kind": "list", "list": "a", "image": "b"}"#,
        r#"{"kind": "wider", "list": "a"}"#,
    ] {
        assert!(serde_json::from_str::<Source>(bad).is_err(), "{bad}");
    }
}

#[test]
fn grey_and_transparent_pictures_become_rgb_and_truncated_jpegs_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    image::GrayImage::from_pixel(3, 2, image::Luma([9])).save(at("g.png")).unwrap();
    image::RgbaImage::from_pixel(3, 2, image::Rgba([1, 2, 3, 0])).save(at("a.png")).unwrap();
    assert_eq!(Picture::open(&at("g.png")).unwrap().pixels, [9; 18]);
    let picture = Picture::open(&at("a.png")).unwrap();
    assert_eq!((picture.width, picture.height, picture.pixels), (3, 2, [1, 2, 3].repeat(6)));

    let noise = RgbImage::from_fn(64, 64, |x, y| image::Rgb([(x * 37 + y * 91) as u8, (x * y) as u8, 3]));
    let mut jpeg = std::io::Cursor::new(Vec::new());
    noise.write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
    let jpeg = jpeg.into_inner();
    std::fs::write(at("whole.jpg"), &jpeg).unwrap();
    std::fs::write(at("half.jpg"), &jpeg[..jpeg.len() * 3 / 4]).unwrap();
    assert_eq!(Picture::open(&at("whole.jpg")).unwrap().pixels.len(), 64 * 64 * 3);
    assert!(Picture::open(&at("half.jpg")).unwrap_err().to_string().contains("half.jpg"));
    assert_eq!(upright(&at("whole.jpg")), (64, 64));
}

#[test]
fn exif_orientation_is_applied_to_pixels_and_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("turned.jpg");
    let mut jpeg = std::io::Cursor::new(Vec::new());
    RgbImage::from_fn(32, 16, |x, _| image::Rgb([if x < 16 { 0 } else { 255 }; 3]))
        .write_to(&mut jpeg, ImageFormat::Jpeg)
        .unwrap();
    // An APP1 segment with one tag: orientation 6, to be turned 90 degrees clockwise.
    let exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0";
    let mut file = vec![0xFF, 0xD8, 0xFF, 0xE1, 0, exif.len() as u8 + 2];
    file.extend_from_slice(exif);
    file.extend_from_slice(&jpeg.into_inner()[2..]);
    std::fs::write(&path, file).unwrap();
    assert_eq!(upright(&path), (16, 32));
    let picture = Picture::open(&path).unwrap();
    assert_eq!((picture.width, picture.height), (16, 32));
    // The dark left half is now above.
    assert!(picture.pixels[0] < 50 && picture.pixels[31 * 16 * 3] > 200);
}

fn upright(path: &Path) -> (u32, u32) {
    crate::picture::upright_size(path).unwrap()
}
