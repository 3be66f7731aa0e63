//! Rules of records: a record stays until its TTL is over, and is returned as it was stored.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is what a rule does, and the module's documentation says when"
)]

use std::{pin::pin, sync::Arc};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{HeaderMap, HeaderValue, StatusCode};

use super::{
    Harness,
    harness::{Found, LONG, Subject, answer, breathe, claim, fine, fingerprint, fresh_key, must},
};
use crate::{
    Begin, Entry, Held, Outcome, Record, Storage, StorageError, StorageErrorKind, StoredResponse,
    Token, TombstoneReason,
};

/// Of many concurrent `complete`s of an absent key with different tokens exactly one is `Yes`, and its record stays
/// (rules 1 and 4).
pub async fn complete_is_exclusive<H: Harness>(harness: &H) {
    const RIVALS: usize = 16;
    let subject = Subject::new(harness).await;
    for _ in 0..4 {
        let key = fresh_key();
        let complete = |rival, storage: Arc<H::Storage>| async move {
            let record = answer(&format!("by rival {rival}"));
            let held = storage.complete(&key, Token::random(), &record, LONG).await;
            (fine(held), record)
        };
        let mut completed = subject
            .race(RIVALS, complete, "`complete` did not return")
            .await;
        completed.retain(|(held, _)| *held == Held::Yes);
        let [(_, record)] = &completed[..] else {
            panic!(
                "{} of {RIVALS} concurrent `complete`s were Yes: retries get the answer of only one of those executions",
                completed.len()
            );
        };
        must!(subject.find(&key) => Found::Record(record.clone()),
            "a `complete` that was Lost changed the record");
    }
}

/// `complete` repeated with the same token is `Yes`: a driver resends a call that got no answer (rule 2).
pub async fn complete_is_idempotent_by_token<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("once");
    let (key, token) = subject.completed(&record, LONG).await;
    for _ in 0..2 {
        must!(subject.complete(&key, token, &record, LONG) => Held::Yes,
            "a repeated `complete` was Lost: its holder believes that another ran the operation too");
    }
    must!(subject.find(&key) => Found::Record(record.clone()),
        "a repeated `complete` changed the record");
}

/// A repeated `complete` keeps the record of the first (rule 2).
pub async fn complete_keeps_the_first_record<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let first = answer("first");
    let (key, token) = subject.completed(&first, LONG).await;
    must!(subject.complete(&key, token, &answer("second"), LONG) => Held::Yes,
        "a repeated `complete` was Lost");
    must!(subject.find(&key) => Found::Record(first.clone()),
        "a repeated `complete` replaced the first record: two clients get two answers");
}

/// A repeated `complete` restarts the TTL of the first record with its own. That is how a tombstone outlives an operation that was
/// given up and still runs (rule 2).
pub async fn complete_repeated_restarts_the_ttl<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let first = answer("first");
    let (key, token) = subject.completed(&first, subject.units(10)).await;
    subject.pass(5).await;
    must!(subject.complete(&key, token, &answer("second"), subject.units(12)) => Held::Yes,
        "a repeated `complete` was Lost");
    subject.pass(6).await;
    must!(subject.find(&key) => Found::Record(first.clone()),
        "a record left with its first TTL though `complete` was repeated: an operation that still runs can run again");
    subject.pass(7).await;
    must!(subject.find(&key) => Found::Nothing,
        "a record outlived the TTL of the repeated `complete`");
}

/// `complete` stores the record if the key is absent: the answer survives a storage that lost the claim (rule 4).
pub async fn complete_when_absent<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    must!(subject.remove(&key) => true, "`remove` did not find the claim");
    let record = answer("late");
    must!(subject.complete(&key, token, &record, LONG) => Held::Yes,
        "`complete` of an absent key was Lost: the operation ran, and a retry runs it again");
    must!(subject.find(&key) => Found::Record(record.clone()),
        "`complete` of an absent key was Yes and stored something else");
}

/// `complete` after the lease is over stores the record if nobody took the key (rule 4).
pub async fn complete_after_expiry_if_untaken<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(2)).await;
    subject.pass(3).await;
    let record = answer("slow");
    must!(subject.complete(&key, token, &record, LONG) => Held::Yes,
        "`complete` of a late holder was Lost though nobody took the key: a retry runs the operation again");
    must!(subject.find(&key) => Found::Record(record.clone()),
        "`complete` of a late holder was Yes and stored something else");
}

/// `complete` is `Lost` once another token holds the key, and leaves that claim alone (rule 4).
pub async fn complete_lost_to_a_new_holder<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, late, holder) = subject.taken_over().await;
    must!(subject.complete(&key, late, &answer("late"), LONG) => Held::Lost,
        "`complete` of a holder that had lost the key was Yes: a late answer stands for what its successor does");
    must!(subject.find(&key) => Found::Claim,
        "a `complete` that was Lost ended the new holder's claim");
    let record = answer("by the new holder");
    must!(subject.complete(&key, holder, &record, LONG) => Held::Yes,
        "one who had lost the key took it back from its new holder");
    must!(subject.find(&key) => Found::Record(record.clone()),
        "a `complete` that was Lost stored its record");
}

/// `complete` is `Lost` once another token completed the key, and keeps that record (rule 4).
pub async fn complete_lost_to_a_record<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("first");
    let (key, _) = subject.completed(&record, LONG).await;
    must!(subject.complete(&key, Token::random(), &answer("second"), LONG) => Held::Lost,
        "`complete` of a key that another completed was Yes: two clients get two answers");
    must!(subject.find(&key) => Found::Record(record.clone()),
        "the record of a completed operation was overwritten");
}

/// A completed key is `Completed` for every token, the one that completed it included (rules 1 and 6).
pub async fn completed_for_every_token<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("done");
    let (key, token) = subject.completed(&record, LONG).await;
    for token in [token, Token::random()] {
        must!(subject.begin(&key, token) => Begin::Completed(record.clone()),
            "`begin` of a completed key did not find its record: the operation runs again");
    }
}

/// A record expires with its TTL, and then the key is free (rule 6).
pub async fn ttl_expires_and_not_before<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("for a while");
    let (key, _) = subject.completed(&record, subject.units(10)).await;
    subject.pass(5).await;
    must!(subject.find(&key) => Found::Record(record.clone()),
        "a record was gone at half of its TTL: a retry runs again");
    subject.pass(6).await;
    must!(subject.find(&key) => Found::Nothing,
        "a record outlived its TTL: a key that may be used again is answered from the past");
}

/// `replace` replaces one record by another (rule 7).
pub async fn replace_changes_a_record<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, _) = subject.completed(&answer("first"), LONG).await;
    let second = Record {
        fingerprint: Some(fingerprint(9)),
        outcome: Outcome::Tombstone(TombstoneReason::Streaming),
    };
    for record in [&answer("a longer answer than the first one was"), &second] {
        subject.replace(&key, record, LONG).await;
        must!(subject.find(&key) => Found::Record(record.clone()),
            "`replace` did not replace the record");
    }
}

/// `replace` does nothing to a free key or a claim (rule 7).
pub async fn replace_leaves_claims_and_free_keys<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    subject.replace(&key, &answer("out of nowhere"), LONG).await;
    must!(subject.find(&key) => Found::Nothing,
        "`replace` stored a record under a free key: its operation never runs");

    let (key, token) = subject.claimed_for(subject.units(10)).await;
    subject.replace(&key, &answer("too early"), LONG).await;
    must!(subject.find(&key) => Found::Claim, "`replace` ended a running claim");
    must!(subject.renew(&key, token, subject.units(10)) => Held::Yes,
        "`replace` took a claim from its holder");
    subject.pass(11).await;
    must!(subject.find(&key) => Found::Nothing, "`replace` changed the lease of a running claim");
}

/// `replace` restarts the TTL with its own (rule 7).
pub async fn replace_restarts_the_ttl<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, _) = subject.completed(&answer("first"), subject.units(10)).await;
    subject.pass(5).await;
    let second = answer("second");
    subject.replace(&key, &second, subject.units(12)).await;
    subject.pass(6).await;
    must!(subject.find(&key) => Found::Record(second.clone()),
        "a replaced record left with the TTL of the first: a retry runs again");
    subject.pass(7).await;
    must!(subject.find(&key) => Found::Nothing, "a replaced record outlived its TTL");
}

/// `remove` takes records and claims, says whether there was one, and leaves the key free.
pub async fn remove_takes_records_and_claims<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    must!(subject.remove(&key) => false, "`remove` found something under a free key");

    let (claimed, token) = subject.claimed().await;
    must!(subject.remove(&claimed) => true, "`remove` did not find a claim");
    must!(subject.renew(&claimed, token, LONG) => Held::Lost, "a removed claim could be renewed");

    let (completed, _) = subject.completed(&answer("done"), LONG).await;
    must!(subject.remove(&completed) => true, "`remove` did not find a record");
    for key in [claimed, completed] {
        must!(subject.find(&key) => Found::Nothing,
            "`remove` left something: the key that an operator cleared stays blocked");
        must!(subject.remove(&key) => false, "`remove` found what it had removed");
    }

    let (key, _) = subject
        .completed(&answer("for a while"), subject.units(2))
        .await;
    subject.pass(3).await;
    must!(subject.remove(&key) => false, "`remove` found a record whose TTL was over");
}

/// `get` changes nothing.
pub async fn get_changes_nothing<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    must!(subject.get(&key) => None, "`get` found something under a free key");
    must!(subject.find(&key) => Found::Nothing, "`get` of a free key left something");

    let (key, token) = subject.claimed().await;
    for _ in 0..2 {
        let entry = subject.get(&key).await;
        assert!(
            matches!(entry, Some(Entry::Claimed { .. })),
            "`get` found {entry:?} instead of a claim"
        );
    }
    let record = answer("done");
    must!(subject.complete(&key, token, &record, LONG) => Held::Yes,
        "`get` took a claim from its holder");
    for _ in 0..2 {
        must!(subject.get(&key) => Some(Entry::Completed(record.clone())), "`get` changed the record");
    }
}

/// Records are returned as they were stored: statuses, header bytes, their order and repeats, bodies of every kind and size,
/// fingerprints, tombstones.
#[expect(clippy::unwrap_used, reason = "the suite's own values are valid")]
pub async fn records_come_back_unchanged<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;

    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("x-repeated", &b"1"[..]),
        ("x-opaque", b"\x80\xfe\xff\ttab"),
        ("x-repeated", b"2"),
        ("x-empty", b""),
        ("x-quote", b"\"\\{}:,"),
        ("x-repeated", b"1"),
    ] {
        headers.append(name, HeaderValue::from_bytes(value).unwrap());
    }
    let long: Bytes = (0..1 << 20_u32).map(|at| (at ^ (at >> 8)) as u8).collect();
    let answers = [
        (200, Bytes::new()),
        (201, Bytes::from_static(b"\0")),
        (204, Bytes::from_static(b"{\"id\": \"\xc3\xa9\"}\r\n\r\n")),
        (303, (0..=255_u8).collect()),
        // A part of something larger.
        (422, long.slice(5..77)),
        (599, long),
        (999, Bytes::new()),
    ];
    let none = HeaderMap::new();
    let response = |(at, (status, body))| {
        let status = StatusCode::from_u16(status).unwrap();
        let headers = [&headers, &none][at % 2];
        Outcome::Response(StoredResponse::new(status, headers, body))
    };
    let answers = answers.into_iter().enumerate().map(response);
    let tombstones = TombstoneReason::ALL.iter().copied().map(Outcome::Tombstone);

    for (at, outcome) in (0_u8..).zip(answers.chain(tombstones)) {
        let record = Record {
            fingerprint: (at % 3 != 0).then(|| fingerprint(at)),
            outcome,
        };
        let (key, _) = subject.completed(&record, LONG).await;
        let Begin::Completed(found) = subject.begin(&key, Token::random()).await else {
            panic!("`begin` of a completed key did not find its record: the operation runs again");
        };
        assert_eq!(
            found, record,
            "a record changed in the storage: a retry gets another answer than the first client"
        );
    }
}

/// A value that is no record is an error of kind `Unreadable`, its key is not free, and `remove` clears it (rule 10).
///
/// Checks nothing if [`Harness::corrupt`] returns false.
pub async fn unreadable_is_an_error<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.completed(&answer("readable"), LONG).await;
    if !harness.corrupt(&subject.storage, &key).await {
        return;
    }
    let claim = claim(Token::random(), LONG);
    for _ in 0..2 {
        assert_unreadable("begin", subject.storage.begin(&key, &claim).await);
        assert_unreadable("get", subject.storage.get(&key).await);
    }
    // It may be told that it does not hold the key. It must not get the key.
    let (other, record) = (Token::random(), answer("other"));
    let completed = subject.storage.complete(&key, other, &record, LONG).await;
    let released = subject.storage.release(&key, token).await;
    for (call, held) in [("complete", completed), ("release", released)] {
        assert!(
            !matches!(held, Ok(Held::Yes)),
            "`{call}` overwrote or took away a record that it can't read"
        );
    }
    assert_unreadable("begin", subject.storage.begin(&key, &claim).await);

    must!(subject.remove(&key) => true, "`remove` did not find what can't be read");
    must!(subject.find(&key) => Found::Nothing,
        "`remove` left what can't be read: the key stays blocked until its TTL is over");
}

fn assert_unreadable<T: std::fmt::Debug>(call: &str, result: Result<T, StorageError>) {
    match result {
        Err(error) if error.kind() == StorageErrorKind::Unreadable => {}
        Err(error) => panic!(
            "`{call}` of an unreadable record failed as {:?}",
            error.kind()
        ),
        Ok(found) => panic!(
            "`{call}` of an unreadable record was {found:?}: the operation may have run, and runs again"
        ),
    }
}

/// A call that is dropped at any point took effect or did not: repeating it succeeds, and nothing is left behind (rule 9).
pub async fn dropped_calls_are_safe<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (first, second) = (answer("first"), answer("second"));
    for polls in 0..6 {
        let (key, token) = (fresh_key(), Token::random());
        let claim = claim(token, LONG);
        drop_after(polls, subject.storage.begin(&key, &claim)).await;
        must!(subject.begin(&key, token) => Begin::Acquired,
            "a dropped `begin` is in its own way");

        drop_after(polls, subject.storage.renew(&key, token, LONG)).await;
        must!(subject.find(&key) => Found::Claim,
            "a dropped `renew` ended the claim: a duplicate may run");
        must!(subject.renew(&key, token, LONG) => Held::Yes,
            "a dropped `renew` cost its holder the claim");

        drop_after(polls, subject.storage.wait(&key, LONG)).await;
        drop_after(polls, subject.storage.get(&key)).await;
        must!(subject.find(&key) => Found::Claim,
            "a dropped `get` or `wait` ended the claim: a duplicate may run");

        drop_after(polls, subject.storage.complete(&key, token, &first, LONG)).await;
        let entry = subject.get(&key).await;
        assert!(
            entry.is_some(),
            "a dropped `complete` left the key free: a retry runs the operation again"
        );
        must!(subject.complete(&key, token, &first, LONG) => Held::Yes,
            "a dropped `complete` is in its own way: the answer is lost");
        must!(subject.find(&key) => Found::Record(first.clone()),
            "a dropped `complete` left something else than its record");

        drop_after(polls, subject.storage.replace(&key, &second, LONG)).await;
        let Some(Entry::Completed(found)) = subject.get(&key).await else {
            panic!("a dropped `replace` took the record away: a retry runs again");
        };
        assert!(
            found == first || found == second,
            "a dropped `replace` left something between the two records"
        );
        subject.replace(&key, &second, LONG).await;
        must!(subject.find(&key) => Found::Record(second.clone()),
            "`replace` did not work after one that was dropped");

        drop_after(polls, subject.storage.remove(&key)).await;
        subject.remove(&key).await;
        must!(subject.find(&key) => Found::Nothing,
            "a dropped `remove` keeps the key from being cleared");

        let (key, token) = subject.claimed().await;
        drop_after(polls, subject.storage.release(&key, token)).await;
        // `Lost` if the first took effect.
        let _ = subject.release(&key, token).await;
        must!(subject.find(&key) => Found::Nothing,
            "a dropped `release` keeps the key from being freed");
    }
}

/// Polls `call` up to `polls` times, yields to other tasks in between, and drops it.
async fn drop_after<T>(polls: u32, call: impl Future<Output = T>) {
    let mut call = pin!(call);
    for _ in 0..polls {
        if call.as_mut().now_or_never().is_some() {
            return;
        }
        breathe().await;
    }
}
