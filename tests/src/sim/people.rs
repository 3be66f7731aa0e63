//! Clients with their retries, and the handlers that serve them.

use std::{
    any::Any,
    convert::Infallible,
    future::Future,
    panic::{AssertUnwindSafe, resume_unwind},
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
    vec,
};

use axum::{body::Body, extract::FromRequestParts, extract::Request, response::Response};
use bytes::Bytes;
use futures_util::{
    FutureExt,
    future::{Either, pending, select},
    stream,
};
use http::StatusCode;
use http_body_util::BodyExt;
use idempotency_axum::{
    Encoded, EncodedKey, Engine, IdempotencyKey, IdempotencyLayer, Key, KeyEncoder,
    ManualIdempotency, Problem, Refusal, RequestView,
};
use tower::{Layer, ServiceExt, service_fn};

use super::{
    LEASE, LIMIT, Terms,
    judge::{Client, End, Judge},
    world::{Home, MeantToPanic, Sleep, World, unmeant},
};
use crate::chance::Chance;

/// One node of the service.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) world: World,
    pub(super) home: Home,
    pub(super) judge: Judge,
    pub(super) terms: Terms,
    pub(super) layer: IdempotencyLayer,
}

/// The nodes that clients find, each in its newest incarnation.
pub(super) type Nodes = Arc<Mutex<Vec<Node>>>;

/// What a client came to.
enum Came {
    To(StatusCode, bool, Bytes),
    /// Its connection broke, or it broke it.
    Nothing,
}

// ---- the handler

/// How an execution goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Course {
    Answers,
    Streams,
    Fails,
    Panics,
    IsTooLong,
    Breaks,
    /// It never returns.
    Hangs,
    /// Its answer's body never ends.
    Drags,
}

impl Course {
    fn draw(chance: &mut Chance, terms: &Terms) -> Self {
        if chance.permille(terms.hung) {
            return Self::Hangs;
        }
        if chance.permille(terms.endless) {
            return Self::Drags;
        }
        match chance.below(100) {
            0..40 => Self::Answers,
            40..65 => Self::Streams,
            65..78 => Self::Fails,
            78..84 => Self::Panics,
            84..92 => Self::IsTooLong,
            _ => Self::Breaks,
        }
    }
}

fn takes(chance: &mut Chance, terms: &Terms) -> Duration {
    match chance.below(100) {
        0..50 => Duration::ZERO,
        50..80 => chance.millis(1, 2_000),
        80..97 => chance.millis(1_000, 4 * LEASE.as_millis() as usize),
        _ => terms.max_hold + chance.millis(1, 60_000),
    }
}

/// An execution until its end; dropped before, it was cancelled.
struct Running {
    node: Node,
    key: EncodedKey,
    number: usize,
    ended: bool,
}

impl Running {
    fn end(&mut self, end: End) {
        self.ended = true;
        self.node.judge.ended(&self.key, self.number, end);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            self.node
                .judge
                .cancelled(self.node.home, &self.key, self.number);
        }
    }
}

impl Node {
    async fn handle(self, request: Request) -> Response {
        let (mut parts, _) = request.into_parts();
        let key = match IdempotencyKey::from_request_parts(&mut parts, &()).await {
            Ok(key) => key.encoded(),
            Err(_) => panic!("a handler ran unprotected"),
        };
        let client = parts
            .extensions
            .get::<Client>()
            .cloned()
            .unwrap_or_default();
        let manual = Option::<ManualIdempotency>::from_request_parts(&mut parts, &()).await;
        let conflict = manual.into_iter().flatten().find(ManualIdempotency::exists);
        let (number, body) = match conflict.filter(|_| self.terms.manual) {
            Some(conflict) => {
                let shown = conflict.response();
                let shown = shown.as_ref().map(|answer| &answer.body()[..]);
                self.judge
                    .started_on_conflict(self.home, &key, &client, shown)
            }
            None => self.judge.started(self.home, &key, &client),
        };
        let mut running = Running {
            node: self.clone(),
            key,
            number,
            ended: false,
        };
        let (course, takes) = self.world.chance(|chance| {
            (
                Course::draw(chance, &self.terms),
                takes(chance, &self.terms),
            )
        });
        if takes > LEASE {
            self.judge.count("fault: handler slower than its lease");
        }
        self.world.sleep(takes).await;
        let created = |body| {
            let mut response = Response::new(body);
            *response.status_mut() = StatusCode::CREATED;
            response
        };
        match course {
            Course::Answers => {
                running.end(End::Answer);
                created(Body::from(body))
            }
            Course::Fails => {
                running.end(End::Failure);
                let mut failed = Response::new(Body::from(body));
                *failed.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                failed
            }
            Course::Panics => {
                running.end(End::Failure);
                self.judge.count("fault: handler panics");
                resume_unwind(Box::new(MeantToPanic) as Box<dyn Any + Send>)
            }
            Course::Hangs => {
                self.judge.count("fault: handler hangs");
                pending().await
            }
            Course::Streams | Course::IsTooLong | Course::Breaks | Course::Drags => {
                created(self.stream(course, running, body))
            }
        }
    }

    /// A body in frames, with pauses in between.
    fn stream(&self, course: Course, running: Running, body: String) -> Body {
        let mut frames: Vec<Bytes> = body
            .as_bytes()
            .chunks(4)
            .map(Bytes::copy_from_slice)
            .collect();
        if course == Course::IsTooLong {
            frames.push(Bytes::from([b'x'; LIMIT].to_vec()));
        }
        self.judge.count("fault: slow body");
        self.judge.streams(&running.key, running.number);
        let world = self.world.clone();
        let frames = frames.into_iter();
        let step =
            move |(mut running, mut frames, broke): (Running, vec::IntoIter<Bytes>, bool)| {
                let world = world.clone();
                async move {
                    let pause = world.chance(|chance| chance.millis(0, 8_000));
                    world.sleep(pause).await;
                    if broke {
                        return None;
                    }
                    match frames.next() {
                        Some(frame) => {
                            if frame.len() >= LIMIT {
                                // The rest is its client's alone, who may leave.
                                running.end(End::Unreplayable);
                            }
                            Some((Ok(frame), (running, frames, false)))
                        }
                        None if course == Course::Streams => {
                            running.end(End::Answer);
                            None
                        }
                        None if course == Course::IsTooLong => None,
                        None if course == Course::Drags => {
                            running.node.judge.count("fault: body never ends");
                            pending().await
                        }
                        None => {
                            running.end(End::Unreplayable);
                            let broken = std::io::Error::other("the source of the answer is gone");
                            Some((Err(broken), (running, frames, true)))
                        }
                    }
                }
            };
        Body::from_stream(stream::unfold((running, frames, false), step))
    }
}

// ---- the client

/// Takes the key's own bytes, so that a trace can be read.
#[derive(Debug)]
pub(super) struct PlainEncoder;

impl KeyEncoder for PlainEncoder {
    fn encode(&self, key: &Key, _: &RequestView<'_>) -> Encoded {
        Encoded {
            key: encoded(key.as_str()),
            fingerprint: None,
        }
    }
}

fn encoded(key: &str) -> EncodedKey {
    let mut bytes = [b' '; 32];
    let length = key.len().min(32);
    bytes[..length].copy_from_slice(&key.as_bytes()[..length]);
    EncodedKey::from_bytes(bytes)
}

/// Asks until it has an answer, or enough.
pub(super) async fn client(world: World, judge: Judge, nodes: Nodes, key: String, patience: usize) {
    for _ in 0..patience {
        let node = {
            let nodes = nodes.lock().unwrap_or_else(PoisonError::into_inner);
            nodes[world.chance(|chance| chance.below(nodes.len()))].clone()
        };
        if node.ask(&key).await {
            judge.count("state: a client was answered");
            // Most are content; some ask again, and must not see another answer.
            if world.chance(|chance| chance.permille(700)) {
                return;
            }
        }
        let pause = world.chance(|chance| chance.millis(10, 20_000));
        world.sleep(pause).await;
    }
    judge.count("state: a client gave up");
}

impl Node {
    /// One request on a connection of its own. Says whether it was answered. The connection is this node's: it dies with it.
    async fn ask(self, key: &str) -> bool {
        let (done, came) = tokio::sync::oneshot::channel();
        let (node, key) = (self.clone(), key.to_owned());
        self.world.spawn(self.home, async move {
            let answered = node.serve(&key).await;
            // Whoever asked is there until it is told.
            let _ = done.send(answered);
        });
        // Its node is gone.
        came.await.unwrap_or(false)
    }

    async fn serve(&self, key: &str) -> bool {
        let (client, asked) = (Client::default(), self.world.now());
        let _under_way = self.judge.asked(self.home);
        let request = Request::post("/orders")
            .header("idempotency-key", key)
            .extension(client.clone());
        let Ok(request) = request.body(Body::empty()) else {
            return false;
        };
        let node = self.clone();
        let service = service_fn(move |request: Request| {
            node.clone().handle(request).map(Ok::<_, Infallible>)
        });
        let service = self.layer.layer(service);
        let stays = self.world.chance(|chance| match chance.below(10) {
            0..2 => chance.millis(0, 30_000),
            2 => chance.millis(0, 400_000),
            _ => self.terms.stay(),
        });
        let leaves = asked + stays;
        let answer = Box::pin(AssertUnwindSafe(service.oneshot(request)).catch_unwind());
        let response = match self.unless_left(leaves, &client, answer).await {
            None => return false,
            Some(Ok(Ok(response))) => response,
            Some(Ok(Err(never))) => match never {},
            Some(Err(panic)) => {
                if let Some(what) = unmeant(&*panic) {
                    self.judge.find(format!("a request panicked: {what}"));
                }
                return false;
            }
        };
        if response.status() == StatusCode::LOCKED {
            self.judge.refused_in_flight(self.home, &encoded(key));
        }
        let is_replay = response.headers().contains_key("idempotency-replayed");
        if response.status() == StatusCode::CONFLICT && !is_replay {
            self.judge.not_replayable(self.home, &encoded(key));
        }
        let problem = response.extensions().get::<Problem>();
        if problem.is_some_and(|problem| problem.refusal() == Refusal::Overloaded) {
            self.judge.count("answer: 503 overloaded");
            self.judge.overloaded(self.home, self.engine().waiting());
        }
        let came = self.read(response, leaves, &client).await;
        self.tell(key, came, asked)
    }

    async fn unless_left<F: Future + Unpin>(
        &self,
        leaves: Duration,
        client: &Client,
        work: F,
    ) -> Option<F::Output> {
        match select(work, pin!(self.until(leaves))).await {
            Either::Left((output, _)) => Some(output),
            Either::Right((_, work)) => {
                let waited = self.engine().waiting();
                self.judge.left(self.home, client);
                drop(work);
                let what = match self.engine().waiting() < waited {
                    true => "fault: a waiter was cancelled",
                    false => "fault: a client left",
                };
                self.judge.count(what);
                None
            }
        }
    }

    fn until(&self, time: Duration) -> Sleep {
        self.world.sleep(time.saturating_sub(self.world.now()))
    }

    pub(super) fn engine(&self) -> &Engine {
        self.layer.engine()
    }

    /// Reads an answer, at a pace of its own, perhaps not to its end.
    async fn read(&self, response: Response, leaves: Duration, client: &Client) -> Came {
        let (parts, mut body) = response.into_parts();
        let is_slow = self.world.chance(|chance| chance.permille(300));
        let mut bytes = Vec::new();
        loop {
            if is_slow {
                let pause = self.world.chance(|chance| chance.millis(0, 20_000));
                self.world.sleep(pause).await;
            }
            let is_tired = self.world.chance(|chance| chance.permille(30));
            let frame = match is_tired {
                true => None,
                false => match select(body.frame(), pin!(self.until(leaves))).await {
                    Either::Left((frame, _)) => Some(frame),
                    Either::Right(_) => None,
                },
            };
            match frame {
                None => {
                    self.judge.count("fault: a client left in its answer");
                    self.judge.left(self.home, client);
                    return Came::Nothing;
                }
                Some(Some(Ok(frame))) => {
                    bytes.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new()))
                }
                Some(Some(Err(_))) => return Came::Nothing,
                Some(None) => break,
            }
        }
        let is_replay = parts.headers.contains_key("idempotency-replayed");
        Came::To(parts.status, is_replay, bytes.into())
    }

    /// Tells the judge. Says whether the client has its answer.
    fn tell(&self, key: &str, came: Came, asked: Duration) -> bool {
        let Came::To(status, is_replay, body) = came else {
            return false;
        };
        let key = encoded(key);
        let text = String::from_utf8_lossy(&body);
        self.judge.count(&format!(
            "answer: {}{}",
            status.as_u16(),
            if is_replay { " replay" } else { "" }
        ));
        match (status.as_u16(), is_replay) {
            (409, true) => self.judge.replayed(self.home, &key, &text, asked),
            (409, false) => {}
            (201 | 500, false) => {
                let own = text.trim_end_matches('x');
                self.judge.answered(self.home, &key, own);
                return status == StatusCode::CREATED;
            }
            (423 | 503, false) => return false,
            _ => self
                .judge
                .find(format!("{status}, {text:?} is no answer of ours")),
        }
        true
    }
}
