//! The network between a service and its Redis.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream, unix::OwnedReadHalf, unix::OwnedWriteHalf},
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout},
};

use super::server::{Redis, directory};
use crate::PATIENCE;

/// Stands between a service and its Redis. It passes everything on until it is told to do something else.
#[derive(Debug)]
pub struct Proxy {
    directory: PathBuf,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// How often what goes wrong, of 1,000 packets.
#[derive(Clone, Copy, Debug, Default)]
pub struct Chaos {
    /// It comes later, by up to 50 ms.
    pub delayed: u32,
    /// It and all that comes after it over this connection is swallowed; nobody is told.
    pub dropped: u32,
    /// The connection is cut in its place.
    pub cut: u32,
}

/// An answer that the proxy keeps to itself.
#[derive(Debug)]
#[must_use]
pub struct Withheld(watch::Receiver<bool>);

/// A packet that the proxy passes on when it is told to.
#[derive(Debug)]
#[must_use]
pub struct Late {
    there: watch::Receiver<bool>,
    go: watch::Sender<bool>,
}

#[derive(Debug)]
struct Shared {
    /// `std`'s lock, because sections are short and never await.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    server: PathBuf,
    welcome: Duration,
    /// How many bytes per second are passed to the server, over all connections, and when there is room for the next.
    rate: Option<(u32, Instant)>,
    chaos: Chaos,
    random: u64,
    withhold: Option<(String, watch::Sender<bool>)>,
    hold: Option<(String, watch::Sender<bool>)>,
    late: Option<(String, watch::Sender<bool>, watch::Receiver<bool>)>,
    faults: usize,
}

/// What becomes of a packet.
enum Fate {
    Pass(Duration),
    /// Passed on when it is told.
    Late(watch::Receiver<bool>),
    Drop,
    Cut,
}

impl Proxy {
    /// Listens on a unix socket for `redis`.
    ///
    /// # Panics
    ///
    /// Panics if it can't.
    #[must_use]
    pub fn start(redis: &Redis) -> Self {
        let directory = directory("proxy");
        let listener = UnixListener::bind(directory.join("proxy.sock")).expect("a unix socket");
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                server: redis.socket(),
                ..State::default()
            }),
        });
        let serving = shared.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((client, _)) = listener.accept().await else {
                    return;
                };
                while connections.try_join_next().is_some() {}
                connections.spawn(connection(serving.clone(), client));
            }
        });
        Self {
            directory,
            shared,
            task,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        format!("unix://{}", self.directory.join("proxy.sock").display())
    }

    /// New connections lead to this server from now on; those that there are stay where they are.
    pub fn lead_to(&self, redis: &Redis) {
        self.shared.state().server = redis.socket();
    }

    /// What is sent first over a new connection takes that long from now on.
    pub fn welcome_after(&self, delay: Duration) {
        self.shared.state().welcome = delay;
    }

    /// No more than so many bytes per second are passed to the server from now on, over all connections together.
    pub fn slow_down(&self, bytes_per_second: u32) {
        self.shared.state().rate = Some((bytes_per_second, Instant::now()));
    }

    /// From now on things go wrong, in an order that comes of `seed`.
    pub fn chaos(&self, seed: u64, chaos: Chaos) {
        let mut state = self.shared.state();
        (state.chaos, state.random) = (chaos, seed);
    }

    /// Things go well again, also on connections that were silent: those are cut. Says how often something went wrong.
    pub fn calm(&self) -> usize {
        let mut state = self.shared.state();
        state.chaos = Chaos::default();
        state.faults
    }

    /// The next packet to the server that contains `words` is passed on, and its answer withheld.
    pub fn withhold_answer(&self, words: &str) -> Withheld {
        let (sender, receiver) = watch::channel(false);
        self.shared.state().withhold = Some((words.to_owned(), sender));
        Withheld(receiver)
    }

    /// The next packet to the server that contains `words` is not passed on.
    pub fn hold(&self, words: &str) -> Withheld {
        let (sender, receiver) = watch::channel(false);
        self.shared.state().hold = Some((words.to_owned(), sender));
        Withheld(receiver)
    }

    /// The next packet to the server that contains `words` is passed on when [`Late::go`] says so, whatever became of its client.
    pub fn late(&self, words: &str) -> Late {
        let (is_there, there) = watch::channel(false);
        let (go, may_go) = watch::channel(false);
        self.shared.state().late = Some((words.to_owned(), is_there, may_go));
        Late { there, go }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        // It may be gone already.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Withheld {
    /// Returns once the proxy has it.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn there(&mut self) {
        let there = self.0.wait_for(|there| *there);
        let there = timeout(PATIENCE, there).await;
        there.expect("something to withhold").expect("a proxy");
    }
}

impl Late {
    /// Returns once the proxy has it.
    ///
    /// # Panics
    ///
    /// Panics after [`PATIENCE`].
    pub async fn there(&mut self) {
        let there = self.there.wait_for(|there| *there);
        let there = timeout(PATIENCE, there).await;
        there.expect("something that is late").expect("a proxy");
    }

    /// Passes it on.
    pub fn go(&self) {
        self.go.send_replace(true);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// xorshift64*
    fn below(&mut self, limit: u32) -> u32 {
        self.random |= 1;
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let high = self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32;
        u32::try_from(high % u64::from(limit)).unwrap_or(0)
    }

    /// When so many bytes may be passed to the server, if not at once.
    fn turn(&mut self, bytes: usize) -> Option<Instant> {
        let (rate, free) = self.rate.as_mut()?;
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        *free = Instant::now().max(*free) + Duration::from_secs(1) * bytes / *rate;
        Some(*free)
    }

    fn fate(&mut self) -> Fate {
        let Chaos {
            delayed,
            dropped,
            cut,
        } = self.chaos;
        let drawn = self.below(1_000);
        let fate = match drawn {
            n if n < dropped => Fate::Drop,
            n if n < dropped + cut => Fate::Cut,
            n if n < dropped + cut + delayed => {
                Fate::Pass(Duration::from_millis(self.below(50).into()))
            }
            _ => return Fate::Pass(Duration::ZERO),
        };
        self.faults += 1;
        fate
    }
}

/// Passes packets between `client` and the server until one of them, or a fault, ends the connection.
async fn connection(shared: Arc<Shared>, client: UnixStream) {
    let (server, welcome) = {
        let state = shared.state();
        (state.server.clone(), state.welcome)
    };
    let Ok(server) = UnixStream::connect(server).await else {
        return;
    };
    sleep(welcome).await;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let withheld = Arc::new(watch::Sender::new(None));
    tokio::select! {
        () = requests(&shared, from_client, to_server, &withheld) => {}
        () = answers(&shared, from_server, to_client, &withheld) => {}
    }
}

type Signal = Arc<watch::Sender<Option<watch::Sender<bool>>>>;

async fn requests(
    shared: &Shared,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    withheld: &Signal,
) {
    while let Some(packet) = packet(&mut from).await {
        let fate = {
            let mut state = shared.state();
            let has = |words: &str| packet.windows(words.len()).any(|w| w == words.as_bytes());
            if let Some((_, there)) = state.hold.take_if(|(words, _)| has(words)) {
                there.send_replace(true);
                Fate::Drop
            } else if let Some((_, there, go)) = state.late.take_if(|(words, ..)| has(words)) {
                there.send_replace(true);
                Fate::Late(go)
            } else {
                if let Some((_, there)) = state.withhold.take_if(|(words, _)| has(words)) {
                    withheld.send_replace(Some(there));
                }
                state.fate()
            }
        };
        let its_turn = shared.state().turn(packet.len());
        if let Some(its_turn) = its_turn {
            sleep_until(its_turn).await;
        }
        if !pass(fate, &packet, &mut from, &mut to).await {
            return;
        }
    }
}

async fn answers(
    shared: &Shared,
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    withheld: &Signal,
) {
    while let Some(packet) = packet(&mut from).await {
        let there = withheld.borrow().clone();
        let fate = match there {
            Some(there) => {
                there.send_replace(true);
                Fate::Drop
            }
            None => shared.state().fate(),
        };
        if !pass(fate, &packet, &mut from, &mut to).await {
            return;
        }
    }
}

/// Says whether the connection is to go on.
async fn pass(
    fate: Fate,
    packet: &[u8],
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
) -> bool {
    match fate {
        Fate::Cut => false,
        Fate::Drop => {
            // Silence, until somebody hangs up.
            while self::packet(from).await.is_some() {}
            false
        }
        Fate::Late(mut go) => {
            // Nobody who would say so is there any more.
            if go.wait_for(|go| *go).await.is_err() {
                return false;
            }
            to.write_all(packet).await.is_ok()
        }
        Fate::Pass(delay) => {
            if !delay.is_zero() {
                sleep(delay).await;
            }
            to.write_all(packet).await.is_ok()
        }
    }
}

async fn packet(from: &mut OwnedReadHalf) -> Option<Vec<u8>> {
    let mut packet = vec![0; 64 << 10];
    match from.read(&mut packet).await {
        Ok(0) | Err(_) => None,
        Ok(len) => {
            packet.truncate(len);
            Some(packet)
        }
    }
}
