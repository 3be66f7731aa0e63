//! What the rules of `Storage` say, for one call after the other.

use std::{collections::HashMap, fmt, time::Duration};

use idempotency_core::{
    Begin, EncodedKey, Entry, Fingerprint, Held, Outcome, Record, Token, TombstoneReason,
};

use crate::calls::{Call, Content};

/// What a call returned.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answer {
    Begin(Begin),
    Held(Held),
    Entry(Option<Entry>),
    Removed(bool),
    /// There is no room.
    Full,
    Nothing,
}

/// How the claim of a key ended, for those who wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum End {
    /// It did not.
    No,
    /// Released: the key is free for one.
    Released,
    /// There is a record, or nobody is left who would tell the next.
    ForAll,
}

/// What happens for lack of room.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Room {
    /// What is larger than all the room gets a tombstone of this reason.
    Tombstones(TombstoneReason),
    RefusesNewKeys,
}

/// What is under each key that is not free.
pub(crate) struct Model {
    now: Duration,
    under: HashMap<EncodedKey, Under>,
    room: Room,
    is_full: Box<dyn Fn(&Self) -> bool>,
}

#[derive(Clone, Debug)]
struct Under {
    until: Duration,
    what: What,
}

#[derive(Clone, Debug)]
enum What {
    Claim(Token, Option<Fingerprint>),
    Record(Record, Token),
}

impl Model {
    pub(crate) fn new(room: Room, is_full: impl Fn(&Self) -> bool + 'static) -> Self {
        Self {
            now: Duration::ZERO,
            under: HashMap::new(),
            room,
            is_full: Box::new(is_full),
        }
    }

    pub(crate) fn now(&self) -> Duration {
        self.now
    }

    pub(crate) fn claims(&self) -> usize {
        self.under.len() - self.records().len()
    }

    pub(crate) fn records(&self) -> Vec<&Record> {
        let whats = self.under.values().map(|under| &under.what);
        whats
            .filter_map(|what| match what {
                What::Record(record, _) => Some(record),
                What::Claim(..) => None,
            })
            .collect()
    }

    pub(crate) fn record(&self, key: &EncodedKey) -> Option<&Record> {
        match &self.under.get(key)?.what {
            What::Record(record, _) => Some(record),
            What::Claim(..) => None,
        }
    }

    pub(crate) fn is_claimed(&self, key: &EncodedKey) -> bool {
        self.under.contains_key(key) && self.record(key).is_none()
    }

    /// The answer to `call`, and what became of the claim of its key.
    pub(crate) fn answer(&mut self, call: &Call) -> (Answer, End) {
        let was_claimed = call.key().is_some_and(|key| self.is_claimed(key));
        let answer = match call {
            Call::Begin { key, claim } => {
                self.begin(key, claim.token, claim.fingerprint, claim.lease)
            }
            Call::Complete {
                key,
                token,
                content,
                ttl,
            } => Answer::Held(self.complete(key, *token, *content, *ttl)),
            Call::Renew { key, token, lease } => Answer::Held(self.renew(key, *token, *lease)),
            Call::Release { key, token, .. } => Answer::Held(self.release(key, *token)),
            Call::Get { key } => Answer::Entry(self.get(key)),
            Call::Replace { key, content, ttl } => {
                if let Some(What::Record(_, by)) = self.what(key) {
                    self.store(key, by, *content, *ttl);
                }
                Answer::Nothing
            }
            Call::Remove { key } => Answer::Removed(self.under.remove(key).is_some()),
            Call::Wait { .. } | Call::Leave { .. } => Answer::Nothing,
            Call::Advance { by } => {
                self.now = self.now.saturating_add(*by);
                Answer::Nothing
            }
        };
        // Something may have been stored for no time at all.
        self.under.retain(|_, under| under.until > self.now);
        let ended = was_claimed && call.key().is_some_and(|key| !self.is_claimed(key));
        let end = match call {
            Call::Advance { .. } => End::ForAll,
            Call::Release { .. } if ended => End::Released,
            _ if ended => End::ForAll,
            _ => End::No,
        };
        (answer, end)
    }

    fn what(&self, key: &EncodedKey) -> Option<What> {
        self.under.get(key).map(|under| under.what.clone())
    }

    /// Rules 1 to 3. The holder's own claim is prolonged, and not shortened: an earlier answer may have promised more.
    fn begin(
        &mut self,
        key: &EncodedKey,
        token: Token,
        fingerprint: Option<Fingerprint>,
        lease: Duration,
    ) -> Answer {
        let until = self.now.saturating_add(lease);
        match self.under.get_mut(key) {
            Some(Under {
                until: end,
                what: What::Claim(holder, _),
            }) if *holder == token => {
                *end = until.max(*end);
            }
            Some(Under {
                until,
                what: What::Claim(_, fingerprint),
            }) => {
                return Answer::Begin(Begin::InFlight {
                    fingerprint: *fingerprint,
                    lease_left: Some(*until - self.now),
                });
            }
            Some(Under {
                what: What::Record(record, _),
                ..
            }) => return Answer::Begin(Begin::Completed(record.clone())),
            None => {
                if self.room == Room::RefusesNewKeys && (self.is_full)(self) {
                    return Answer::Full;
                }
                let what = What::Claim(token, fingerprint);
                self.under.insert(*key, Under { until, what });
            }
        }
        Answer::Begin(Begin::Acquired)
    }

    /// Rules 2 and 4.
    fn complete(
        &mut self,
        key: &EncodedKey,
        token: Token,
        content: Content,
        ttl: Duration,
    ) -> Held {
        match self.what(key) {
            Some(What::Claim(holder, _)) if holder != token => return Held::Lost,
            Some(What::Record(_, by)) if by != token => return Held::Lost,
            Some(What::Record(..)) => {
                // The first record stays.
                let until = self.now.saturating_add(ttl);
                self.under
                    .entry(*key)
                    .and_modify(|under| under.until = until);
            }
            Some(What::Claim(..)) | None => self.store(key, token, content, ttl),
        }
        Held::Yes
    }

    /// Rule 5.
    fn renew(&mut self, key: &EncodedKey, token: Token, lease: Duration) -> Held {
        match self.under.get_mut(key) {
            Some(Under {
                until,
                what: What::Claim(holder, _),
            }) if *holder == token => {
                *until = self.now.saturating_add(lease);
                Held::Yes
            }
            _ => Held::Lost,
        }
    }

    /// Rule 5.
    fn release(&mut self, key: &EncodedKey, token: Token) -> Held {
        match self.what(key) {
            Some(What::Claim(holder, _)) if holder == token => {
                self.under.remove(key);
                Held::Yes
            }
            _ => Held::Lost,
        }
    }

    fn get(&self, key: &EncodedKey) -> Option<Entry> {
        let under = self.under.get(key)?;
        Some(match &under.what {
            What::Claim(_, fingerprint) => Entry::Claimed {
                fingerprint: *fingerprint,
                lease_left: Some(under.until - self.now),
            },
            What::Record(record, _) => Entry::Completed(record.clone()),
        })
    }

    fn store(&mut self, key: &EncodedKey, by: Token, content: Content, ttl: Duration) {
        let mut record = content.record();
        if let (true, Room::Tombstones(reason)) = (content.is_too_large(), self.room) {
            record.outcome = Outcome::Tombstone(reason);
        }
        let under = Under {
            until: self.now.saturating_add(ttl),
            what: What::Record(record, by),
        };
        self.under.insert(*key, under);
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model")
            .field("now", &self.now)
            .field("under", &self.under)
            .finish_non_exhaustive()
    }
}
