//! Processes that train together, one a GPU: how they find each other, and what they tell each other beside NCCL's sums.
//!
//! Rank 0 waits at a TCP port, the others connect to it and stay connected: losses (and, where the host judges, the counts that they are
//! divided by), the state that all start from, and whether to go on, go that way, small messages in one order. A rank that ends, however
//! it does, closes its connection; then rank 0 ends with an error, then the others do, so that nobody waits for what will not come.

mod launch;
#[cfg(test)]
mod tests;

pub use launch::Launch;

use crate::error::{Error, Result};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a connection of ours begins with.
const MAGIC: [u8; 8] = *b"farface\x01";
/// Of the messages and their order; goes up when they change.
const VERSION: u32 = 1;
/// How long a connection may take to say who it is.
const HELLO: Duration = Duration::from_secs(5);
/// How long ranks usually wait for each other at the start.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// Longest text of a refusal.
const MOST_TEXT: usize = 1000;

/// What a message is about. Ranks that are not at the same place find out by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// The communicator's identity.
    Identity = 1,
    /// Parameters and all that a checkpoint has.
    State = 2,
    /// Whether there is a next step.
    GoOn = 3,
    /// Counts of a batch that the host judges.
    Counts = 4,
    /// Losses of a batch.
    Losses = 5,
    /// Checksums of parameters.
    Parameters = 6,
    /// The end.
    End = 7,
}

/// The other processes, as one of them sees them.
#[derive(Debug)]
pub struct Ranks {
    launch: Launch,
    /// Of rank 0 those of ranks 1 and up, in order; of the others that of rank 0.
    peers: Mutex<Vec<TcpStream>>,
}

fn broken(rank: usize, error: std::io::Error) -> Error {
    let gone = [
        ErrorKind::UnexpectedEof,
        ErrorKind::ConnectionReset,
        ErrorKind::BrokenPipe,
        ErrorKind::ConnectionAborted,
    ];
    let error = if gone.contains(&error.kind()) {
        std::io::Error::new(error.kind(), "it ended before the training did; its own output says why")
    } else {
        error
    };
    Error::io(format!("rank {rank}"), error)
}

fn send(peer: &mut TcpStream, what: What, bytes: &[u8]) -> std::io::Result<()> {
    let mut message = Vec::with_capacity(9 + bytes.len().min(1 << 16));
    message.push(what as u8);
    message.extend((bytes.len() as u64).to_le_bytes());
    // One segment for what is small.
    if bytes.len() <= 1 << 16 {
        message.extend(bytes);
        return peer.write_all(&message);
    }
    peer.write_all(&message)?;
    peer.write_all(bytes)
}

fn receive(peer: &mut TcpStream, what: What, rank: usize) -> Result<Vec<u8>> {
    let mut head = [0; 9];
    peer.read_exact(&mut head).map_err(|e| broken(rank, e))?;
    if head[0] != what as u8 {
        return Err(Error::Internal(format!("rank {rank} sends message {}, {what:?} is awaited", head[0])));
    }
    let length = u64::from_le_bytes(std::array::from_fn(|i| head[1 + i]));
    let mut bytes = Vec::new();
    peer.take(length).read_to_end(&mut bytes).map_err(|e| broken(rank, e))?;
    if bytes.len() as u64 != length {
        return Err(broken(rank, ErrorKind::UnexpectedEof.into()));
    }
    Ok(bytes)
}

/// What a rank says of itself when it connects.
fn hello(launch: &Launch) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for number in [VERSION, launch.world, launch.rank] {
        bytes.extend(number.to_le_bytes());
    }
    let mut program = [0; 16];
    let name = env!("CARGO_PKG_VERSION").as_bytes();
    let length = name.len().min(program.len());
    program[..length].copy_from_slice(&name[..length]);
    bytes.extend(program);
    bytes
}

const HELLO_BYTES: usize = 8 + 3 * 4 + 16;

impl Ranks {
    /// Waits until all are there, for `patience` at most.
    pub fn meet(launch: &Launch, patience: Duration) -> Result<Self> {
        let until = Instant::now() + patience;
        let peers = if launch.rank == 0 { gather(launch, until)? } else { vec![find(launch, until)?] };
        for peer in &peers {
            let ready = peer.set_read_timeout(None).and_then(|()| peer.set_nodelay(true));
            ready.map_err(|e| Error::io("a rank's connection", e))?;
        }
        Ok(Self { launch: launch.clone(), peers: Mutex::new(peers) })
    }

    /// What the launcher told this process.
    pub fn launch(&self) -> &Launch {
        &self.launch
    }

    /// Number of this process.
    pub fn rank(&self) -> usize {
        self.launch.rank as usize
    }

    /// How many there are.
    pub fn world(&self) -> usize {
        self.launch.world as usize
    }

    /// Which of a batch's examples are this rank's. Errors where they cannot be shared evenly.
    pub fn part(&self, batch: usize) -> Result<Range<usize>> {
        let (rank, world) = (self.rank(), self.world());
        if batch == 0 || !batch.is_multiple_of(world) {
            return Err(Error::InvalidArgument(format!(
                "batch.size {batch} is no multiple of the {world} processes, which take equal parts of every batch"
            )));
        }
        Ok(batch / world * rank..batch / world * (rank + 1))
    }

    /// A message is written and read whole by one thread.
    fn peers(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of the rank at the other end of a connection.
    fn at_end_of(&self, i: usize) -> usize {
        if self.rank() == 0 {
            i + 1
        } else {
            0
        }
    }

    /// An error where a rank has ended that this one hears of, without waiting.
    pub fn check(&self) -> Result<()> {
        for (i, peer) in self.peers().iter().enumerate() {
            let rank = self.at_end_of(i);
            let looked = peer.set_nonblocking(true).and_then(|()| {
                let looked = peer.peek(&mut [0]);
                peer.set_nonblocking(false).and(looked)
            });
            match looked {
                Ok(0) => return Err(broken(rank, ErrorKind::UnexpectedEof.into())),
                // It is ahead, or still at work.
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(broken(rank, e)),
            }
        }
        Ok(())
    }

    /// Rank 0's `bytes`, at every rank.
    pub fn from_first(&self, what: What, bytes: &[u8]) -> Result<Vec<u8>> {
        let mut peers = self.peers();
        if self.rank() != 0 {
            return receive(&mut peers[0], what, 0);
        }
        for (i, peer) in peers.iter_mut().enumerate() {
            send(peer, what, bytes).map_err(|e| broken(i + 1, e))?;
        }
        Ok(bytes.to_vec())
    }

    /// What every rank has, in their order, at every rank.
    pub fn all(&self, what: What, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut peers = self.peers();
        if self.rank() != 0 {
            send(&mut peers[0], what, own).map_err(|e| broken(0, e))?;
            return (0..self.world()).map(|_| receive(&mut peers[0], what, 0)).collect();
        }
        let mut all = vec![own.to_vec()];
        for (i, peer) in peers.iter_mut().enumerate() {
            all.push(receive(peer, what, i + 1)?);
        }
        for (i, peer) in peers.iter_mut().enumerate() {
            for bytes in &all {
                send(peer, what, bytes).map_err(|e| broken(i + 1, e))?;
            }
        }
        Ok(all)
    }

    /// Numbers of every rank, in their order.
    pub fn all_numbers<const N: usize>(&self, what: What, own: [u64; N]) -> Result<Vec<[u64; N]>> {
        let bytes: Vec<u8> = own.iter().flat_map(|n| n.to_le_bytes()).collect();
        let numbers = |(rank, bytes): (usize, Vec<u8>)| {
            if bytes.len() != N * 8 {
                return Err(Error::Internal(format!("rank {rank} sends {} bytes as {what:?}", bytes.len())));
            }
            let number = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| bytes[8 * i + k]));
            Ok(std::array::from_fn(number))
        };
        self.all(what, &bytes)?.into_iter().enumerate().map(numbers).collect()
    }

    /// Makes `counts` those of all ranks together.
    pub fn sum<const N: usize>(&self, counts: [usize; N]) -> Result<[usize; N]> {
        let all = self.all_numbers(What::Counts, counts.map(|c| c as u64))?;
        Ok(std::array::from_fn(|i| all.iter().map(|counts| counts[i] as usize).sum()))
    }
}

/// Waits for the others at the port. Whoever is none of them is sent away.
fn gather(launch: &Launch, until: Instant) -> Result<Vec<TcpStream>> {
    let place = format!("{}:{}", launch.address, launch.port);
    let listener = listen(launch).map_err(|e| {
        Error::io(format!("{place} (MASTER_ADDR and the port after MASTER_PORT), where ranks meet"), e)
    })?;
    let patient = |e| Error::io(&place, e);
    listener.set_nonblocking(true).map_err(patient)?;
    let mut peers: Vec<Option<TcpStream>> = (1..launch.world).map(|_| None).collect();
    while peers.iter().any(Option::is_none) {
        match listener.accept() {
            Ok((stream, _)) => {
                // A stranger's mistakes are its own.
                if let Ok((stream, rank)) = admit(stream, launch, &peers) {
                    peers[rank - 1] = Some(stream);
                }
            }
            Err(e) if [ErrorKind::WouldBlock, ErrorKind::ConnectionAborted].contains(&e.kind()) => {
                if Instant::now() >= until {
                    let missing = (1..).zip(&peers).filter(|(_, p)| p.is_none());
                    let missing: Vec<String> = missing.map(|(rank, _)| rank.to_string()).collect();
                    let text = format!("waited in vain for rank {} of {}", missing.join(", "), launch.world);
                    return Err(Error::io(&place, std::io::Error::new(ErrorKind::TimedOut, text)));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(e) => return Err(patient(e)),
        }
    }
    Ok(peers.into_iter().flatten().collect())
}

/// At rank 0's own address, that no other network sees it; at all of them where this machine knows it by another (behind a
/// translation of addresses).
fn listen(launch: &Launch) -> std::io::Result<TcpListener> {
    match TcpListener::bind((launch.address.as_str(), launch.port)) {
        Err(e) if e.kind() == ErrorKind::AddrNotAvailable => {
            TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, launch.port)))
        }
        bound => bound,
    }
}

/// Whether a connection is a rank's that is awaited, and which. It is told.
fn admit(
    mut stream: TcpStream,
    launch: &Launch,
    peers: &[Option<TcpStream>],
) -> std::io::Result<(TcpStream, usize)> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(HELLO))?;
    stream.set_write_timeout(Some(HELLO))?;
    let mut bytes = [0; HELLO_BYTES];
    stream.read_exact(&mut bytes)?;
    if bytes[..8] != MAGIC {
        return Err(ErrorKind::InvalidData.into());
    }
    let number = |i: usize| u32::from_le_bytes(std::array::from_fn(|k| bytes[8 + 4 * i + k]));
    let (world, rank) = (number(1), number(2) as usize);
    let refusal = if number(0) != VERSION || bytes[20..] != hello(launch)[20..] {
        let own = env!("CARGO_PKG_VERSION");
        Some(format!("rank 0 is farface {own}, rank {rank} is of another version"))
    } else if world != launch.world {
        Some(format!("rank 0 is one of {}, rank {rank} one of {world}", launch.world))
    } else if rank == 0 || rank > peers.len() {
        Some(format!("there is no rank {rank} to wait for"))
    } else {
        peers[rank - 1].is_some().then(|| format!("rank {rank} is here already"))
    };
    let text = refusal.clone().unwrap_or_default();
    let mut answer = MAGIC.to_vec();
    answer.extend((text.len().min(MOST_TEXT) as u32).to_le_bytes());
    answer.extend(text.bytes().take(MOST_TEXT));
    stream.write_all(&answer)?;
    stream.set_write_timeout(None)?;
    match refusal {
        None => Ok((stream, rank)),
        Some(text) => Err(std::io::Error::new(ErrorKind::InvalidData, text)),
    }
}

/// Connects to rank 0, which may not be there yet.
fn find(launch: &Launch, until: Instant) -> Result<TcpStream> {
    let place = format!("{}:{}", launch.address, launch.port);
    let mut last = std::io::Error::from(ErrorKind::TimedOut);
    while Instant::now() < until {
        match connect(launch, until) {
            Ok(mut stream) => match introduce(&mut stream, launch, until) {
                Ok(None) => return Ok(stream),
                Ok(Some(refusal)) => {
                    return Err(Error::InvalidArgument(format!("{place} refuses: {refusal}")))
                }
                // Closed before rank 0 looked at it: a listener of an earlier run that was ending.
                Err(e) => last = e,
            },
            Err(e) => last = e,
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let text = format!("rank 0 was not found there (MASTER_ADDR and the port after MASTER_PORT): {last}");
    Err(Error::io(place, std::io::Error::new(last.kind(), text)))
}

fn connect(launch: &Launch, until: Instant) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from(ErrorKind::AddrNotAvailable);
    for address in (launch.address.as_str(), launch.port).to_socket_addrs()? {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Says who this is; the reason where rank 0 refuses.
fn introduce(stream: &mut TcpStream, launch: &Launch, until: Instant) -> std::io::Result<Option<String>> {
    // Rank 0 may be busy with a stranger.
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.write_all(&hello(launch))?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    if head[..8] != MAGIC {
        return Err(std::io::Error::new(ErrorKind::InvalidData, "another program answers there"));
    }
    let length = u32::from_le_bytes(std::array::from_fn(|i| head[8 + i])) as usize;
    let mut text = vec![0; length.min(MOST_TEXT)];
    stream.read_exact(&mut text)?;
    Ok((length > 0).then(|| String::from_utf8_lossy(&text).into_owned()))
}
