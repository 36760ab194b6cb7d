//! Ranks as threads of one process, which meet over the loopback.

use super::*;

/// A port and the one after it that nobody has at the moment: the first is what a launcher would say.
fn launch(world: u32) -> Launch {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    Launch {
        launcher: "torchrun",
        rank: 0,
        world,
        local_rank: 0,
        local_world: world,
        address: "127.0.0.1".into(),
        port,
    }
}

fn of_rank(launch: &Launch, rank: u32) -> Launch {
    Launch { rank, local_rank: rank, ..launch.clone() }
}

const SOON: Duration = Duration::from_secs(20);

/// `f` of every rank, each in a thread.
fn together<R: Send>(world: u32, f: impl Fn(Ranks) -> R + Sync) -> Vec<R> {
    let launch = launch(world);
    let meet = |rank: u32| f(Ranks::meet(&of_rank(&launch, rank), SOON).unwrap());
    let meet = &meet;
    std::thread::scope(|scope| {
        // The last comes first.
        let all: Vec<_> = (0..world).rev().map(|rank| scope.spawn(move || meet(rank))).collect();
        all.into_iter().rev().map(|t| t.join().unwrap()).collect()
    })
}

#[test]
fn messages_reach_every_rank_in_the_ranks_order() {
    let got = together(3, |ranks| {
        assert_eq!(ranks.part(12).unwrap(), ranks.rank() * 4..ranks.rank() * 4 + 4);
        assert!(ranks.part(10).unwrap_err().to_string().contains("batch.size 10"));
        let large = vec![ranks.rank() as u8 + 1; 200_000];
        let state = ranks.from_first(What::State, &large).unwrap();
        assert!(state.len() == 200_000 && state.iter().all(|&b| b == 1));
        let all = ranks.all(What::Losses, &large[..ranks.rank()]).unwrap();
        assert_eq!(all, [vec![], vec![2], vec![3, 3]]);
        ranks.check().unwrap();
        ranks.sum([ranks.rank(), 10]).unwrap()
    });
    assert_eq!(got, [[3, 30]; 3]);
}

#[test]
fn a_rank_that_ends_is_an_error_of_all_others() {
    let errors = together(3, |ranks| {
        ranks.sum([1]).unwrap();
        if ranks.rank() == 2 {
            return String::new();
        }
        // As one does who waits for a sum.
        let began = Instant::now();
        loop {
            if let Err(e) = ranks.check() {
                return e.to_string();
            }
            assert!(began.elapsed() < SOON, "rank {} hangs", ranks.rank());
            std::thread::sleep(Duration::from_millis(5));
        }
    });
    assert!(errors[0].contains("rank 2") && errors[0].contains("ended before"), "{errors:?}");
    assert!(errors[1].contains("rank 0") && errors[1].contains("ended before"), "{errors:?}");
    // And of one who waits for a message.
    let errors = together(2, |ranks| (ranks.rank() == 0).then(|| ranks.sum([1]).unwrap_err().to_string()));
    assert!(errors[0].as_ref().unwrap().contains("rank 1"), "{errors:?}");
}

#[test]
fn ranks_at_different_places_are_told() {
    let errors = together(2, |ranks| {
        let what = if ranks.rank() == 0 { What::Counts } else { What::Losses };
        ranks.all(what, &[]).unwrap_err().to_string()
    });
    assert!(errors[0].contains("Counts is awaited"), "{errors:?}");
}

#[test]
fn strangers_are_sent_away_and_the_ranks_meet() {
    let launch = launch(2);
    let address = (launch.address.clone(), launch.port);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| Ranks::meet(&launch, SOON).unwrap());
        let stranger = |says: &[u8]| {
            let mut stream = loop {
                if let Ok(stream) = TcpStream::connect((address.0.as_str(), address.1)) {
                    break stream;
                }
                assert!(!first.is_finished());
                std::thread::sleep(Duration::from_millis(5));
            };
            stream.write_all(says).unwrap();
            let mut answer = Vec::new();
            // What was not read makes it a reset.
            let _ = stream.read_to_end(&mut answer);
            String::from_utf8_lossy(&answer).into_owned()
        };
        assert_eq!(stranger(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n"), "");
        let mut other = hello(&of_rank(&launch, 1));
        other[8] = 9;
        assert!(stranger(&other).contains("another version"));
        let mut other = hello(&of_rank(&launch, 1));
        other[21] ^= 1;
        assert!(stranger(&other).contains("another version"));
        let more = Launch { world: 3, ..of_rank(&launch, 1) };
        let error = Ranks::meet(&more, SOON).unwrap_err().to_string();
        assert!(error.contains("one of 2, rank 1 one of 3"), "{error}");
        let error = Ranks::meet(&of_rank(&launch, 5), SOON).unwrap_err().to_string();
        assert!(error.contains("no rank 5"), "{error}");
        let second = Ranks::meet(&of_rank(&launch, 1), SOON).unwrap();
        let first = first.join().unwrap();
        let sum = scope.spawn(move || first.sum([3]).unwrap());
        assert_eq!(second.sum([4]).unwrap(), [7]);
        assert_eq!(sum.join().unwrap(), [7]);
    });
}

#[test]
fn who_does_not_come_is_named_after_a_while() {
    let launch = launch(3);
    let short = Duration::from_millis(300);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| Ranks::meet(&launch, short).unwrap_err().to_string());
        let second = scope.spawn(|| Ranks::meet(&of_rank(&launch, 1), SOON));
        let error = first.join().unwrap();
        assert!(error.contains("rank 2 of 3") || error.contains("rank 1, 2 of 3"), "{error}");
        drop(second);
    });
    let error = Ranks::meet(&of_rank(&launch, 1), short).unwrap_err().to_string();
    assert!(error.contains("rank 0 was not found") && error.contains(&launch.port.to_string()), "{error}");
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let launch = Launch { port: taken.local_addr().unwrap().port(), ..launch };
    let error = Ranks::meet(&launch, short).unwrap_err().to_string();
    assert!(error.contains("MASTER_PORT") && error.contains("where ranks meet"), "{error}");
}
