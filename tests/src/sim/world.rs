//! Time, tasks and chance: a world that one thread steps through, the same way for the same seed.
//!
//! Nothing here waits for anything real. A step polls one task that is ready, chosen by chance, or, when none is, moves time to
//! the next timer. A task belongs to an incarnation of a node: it dies with it, and stands still while its node is paused.

use std::{
    any::Any,
    collections::BTreeMap,
    fmt,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use futures_util::future::BoxFuture;
use idempotency_axum::{Env, Environment, Spawner};

use crate::chance::Chance;

/// The node that keeps the records. It never dies: a storage that forgets is another subject.
pub(super) const SERVER: usize = 0;

/// What a handler that is to panic panics with; any other panic is a finding.
#[derive(Debug)]
pub(super) struct MeantToPanic;

/// An incarnation of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Home {
    pub(super) node: usize,
    life: u32,
}

/// The tasks that can go on, in the order in which they were woken.
type ReadyList = Arc<Mutex<Vec<u64>>>;

/// Shared by all that is in it.
#[derive(Clone)]
pub(super) struct World(Arc<Mutex<State>>);

struct State {
    now: Duration,
    chance: Chance,
    nodes: Vec<Node>,
    tasks: BTreeMap<u64, Task>,
    next_id: u64,
    timers: BTreeMap<(Duration, u64), Waker>,
    ready: ReadyList,
    /// Panics that nobody meant.
    panics: Vec<String>,
}

#[derive(Clone, Copy)]
struct Node {
    life: u32,
    paused: bool,
    /// What its clock shows at the origin of time, and how much faster or slower it runs, in millionths.
    offset: Duration,
    pace: i32,
}

struct Task {
    home: Home,
    /// Taken out while it is polled.
    future: Option<BoxFuture<'static, ()>>,
}

/// What a step did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    Polled,
    TimePassed,
    /// Nothing is ready and nothing will be.
    Still,
}

struct Ready {
    id: u64,
    ready: ReadyList,
}

impl Wake for Ready {
    fn wake(self: Arc<Self>) {
        let mut ready = lock(&self.ready);
        if !ready.contains(&self.id) {
            ready.push(self.id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Whose nodes' clocks differ by up to an hour, and in pace by up to a hundredth; the server's is right.
    pub(super) fn new(seed: u64, nodes: usize) -> Self {
        let mut chance = Chance(seed);
        let nodes = (0..=nodes).map(|node| Node {
            life: 0,
            paused: false,
            offset: match node {
                SERVER => Duration::ZERO,
                _ => chance.millis(0, 3_600_000),
            },
            pace: match node {
                SERVER => 0,
                _ => chance.below(20_001) as i32 - 10_000,
            },
        });
        let nodes = nodes.collect();
        Self(Arc::new(Mutex::new(State {
            now: Duration::ZERO,
            chance,
            nodes,
            tasks: BTreeMap::new(),
            next_id: 0,
            timers: BTreeMap::new(),
            ready: Arc::default(),
            panics: Vec::new(),
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    pub(super) fn now(&self) -> Duration {
        self.lock().now
    }

    pub(super) fn chance<T>(&self, draw: impl FnOnce(&mut Chance) -> T) -> T {
        draw(&mut self.lock().chance)
    }

    pub(super) fn home(&self, node: usize) -> Home {
        let life = self.lock().nodes[node].life;
        Home { node, life }
    }

    pub(super) fn is_alive(&self, home: Home) -> bool {
        self.lock().nodes[home.node].life == home.life
    }

    pub(super) fn is_paused(&self, node: usize) -> bool {
        self.lock().nodes[node].paused
    }

    pub(super) fn spawn(&self, home: Home, task: impl Future<Output = ()> + Send + 'static) {
        let mut state = self.lock();
        if state.nodes[home.node].life != home.life {
            // What the dead leave behind is dropped where nothing is locked.
            drop(state);
            return;
        }
        let id = state.id();
        let future = Some(Box::pin(task) as BoxFuture<'static, ()>);
        state.tasks.insert(id, Task { home, future });
        lock(&state.ready).push(id);
    }

    /// How many tasks live on nodes that are not the server.
    pub(super) fn tasks(&self) -> usize {
        let state = self.lock();
        let is_nodes = |task: &&Task| task.home.node != SERVER;
        state.tasks.values().filter(is_nodes).count()
    }

    pub(super) fn pause(&self, node: usize, paused: bool) {
        self.lock().nodes[node].paused = paused;
    }

    /// All that the node does ends where it stands; the next incarnation knows nothing of it.
    pub(super) fn crash(&self, node: usize) {
        let dead: Vec<_> = {
            let mut state = self.lock();
            state.nodes[node].life += 1;
            state.nodes[node].paused = false;
            let of_node = state
                .tasks
                .iter()
                .filter(|(_, task)| task.home.node == node);
            let ids: Vec<_> = of_node.map(|(id, _)| *id).collect();
            ids.iter().filter_map(|id| state.tasks.remove(id)).collect()
        };
        drop(dead);
    }

    pub(super) fn panics(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().panics)
    }

    pub(super) fn step(&self) -> Step {
        let Some((id, mut future, ready)) = self.choose() else {
            return self.pass_time();
        };
        let waker = Waker::from(Arc::new(Ready { id, ready }));
        let mut context = Context::from_waker(&waker);
        let polled = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut context)));
        match polled {
            Ok(Poll::Pending) => {
                let mut state = self.lock();
                // Unless it killed its own node.
                if let Some(task) = state.tasks.get_mut(&id) {
                    task.future = Some(future);
                    return Step::Polled;
                }
                drop(state);
            }
            Ok(Poll::Ready(())) => drop(self.lock().tasks.remove(&id)),
            Err(panic) => {
                let mut state = self.lock();
                state.tasks.remove(&id);
                if let Some(what) = unmeant(&*panic) {
                    state.panics.push(what);
                }
            }
        }
        drop(future);
        Step::Polled
    }

    /// A task that is ready and may run, its future, and where its waker says that it is ready again.
    fn choose(&self) -> Option<(u64, BoxFuture<'static, ()>, ReadyList)> {
        let mut state = self.lock();
        let State {
            chance,
            nodes,
            tasks,
            ready,
            ..
        } = &mut *state;
        let shared = ready.clone();
        let mut ready = lock(ready);
        ready.retain(|id| tasks.contains_key(id));
        let runs = |id: &u64| !nodes[tasks[id].home.node].paused;
        let runnable = ready.iter().filter(|id| runs(id)).count();
        if runnable == 0 {
            return None;
        }
        let chosen = chance.below(runnable);
        let at = (0..ready.len())
            .filter(|at| runs(&ready[*at]))
            .nth(chosen)?;
        let id = ready.swap_remove(at);
        let future = tasks.get_mut(&id)?.future.take()?;
        Some((id, future, shared))
    }

    fn pass_time(&self) -> Step {
        let mut state = self.lock();
        let Some(((at, _), waker)) = state.timers.pop_first() else {
            return Step::Still;
        };
        state.now = state.now.max(at);
        drop(state);
        waker.wake();
        Step::TimePassed
    }

    /// By the time of the world.
    pub(super) fn sleep(&self, duration: Duration) -> Sleep {
        let deadline = self.now().saturating_add(duration);
        Sleep {
            world: self.clone(),
            deadline,
            timer: None,
        }
    }

    /// The surroundings of an engine on a node.
    pub(super) fn env(&self, home: Home) -> Env {
        Env::new(Surroundings {
            world: self.clone(),
            home,
        })
    }
}

impl State {
    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

/// What a panic says, unless it was meant.
pub(super) fn unmeant(panic: &(dyn Any + Send)) -> Option<String> {
    if panic.is::<MeantToPanic>() {
        return None;
    }
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    Some(text.unwrap_or_else(|| "something that is no text".to_owned()))
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World")
            .field("now", &self.now())
            .finish_non_exhaustive()
    }
}

/// A timer of the world.
pub(super) struct Sleep {
    world: World,
    deadline: Duration,
    timer: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let deadline = self.deadline;
        let world = self.world.clone();
        let mut state = world.lock();
        if state.now >= deadline {
            return Poll::Ready(());
        }
        let id = *self.timer.get_or_insert_with(|| state.id());
        state.timers.insert((deadline, id), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(id) = self.timer {
            let waker = self.world.lock().timers.remove(&(self.deadline, id));
            drop(waker);
        }
    }
}

struct Surroundings {
    world: World,
    home: Home,
}

impl Surroundings {
    fn pace(&self) -> i32 {
        self.world.lock().nodes[self.home.node].pace
    }
}

impl Environment for Surroundings {
    fn now(&self) -> Duration {
        let state = self.world.lock();
        let node = state.nodes[self.home.node];
        node.offset + scaled(state.now, node.pace)
    }

    fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
        // A microsecond more, so that rounding never wakes it before its time is over.
        let duration = scaled(duration, -self.pace()).saturating_add(Duration::from_micros(1));
        Box::pin(self.world.sleep(duration))
    }

    fn fill_random(&self, buffer: &mut [u8]) {
        self.world.chance(|chance| {
            for chunk in buffer.chunks_mut(8) {
                chunk.copy_from_slice(&chance.next().to_le_bytes()[..chunk.len()]);
            }
        });
    }

    fn spawner(&self) -> Option<Spawner> {
        let (world, home) = (self.world.clone(), self.home);
        Some(Spawner::new(move |task| world.spawn(home, task)))
    }
}

fn scaled(duration: Duration, pace: i32) -> Duration {
    let micros = i64::try_from(duration.as_micros()).unwrap_or(i64::MAX / 4);
    let scaled = i128::from(micros) * i128::from(1_000_000 + pace) / 1_000_000;
    Duration::from_micros(u64::try_from(scaled).unwrap_or(u64::MAX / 4))
}
