//! Rules of records: a record stays until its TTL is over, and is returned as it was stored.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is what a rule does, and the module's documentation says when"
)]

use std::{pin::pin, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tokio::sync::Barrier;

use super::{
    Harness,
    harness::{LONG, Subject, answer, breathe, fine, fingerprint, fresh_key, poll_once},
};
use crate::{
    Begin, Entry, Held, NewClaim, Outcome, Record, Storage, StorageError, StorageErrorKind,
    StoredResponse, Token, TombstoneReason,
};

/// Of many concurrent `complete`s of an absent key with different tokens exactly one is `Yes`, and its record stays
/// (rules 1 and 4).
pub async fn complete_is_exclusive<H: Harness>(harness: &H) {
    const RIVALS: usize = 16;
    let subject = Subject::new(harness).await;
    for _ in 0..4 {
        let key = fresh_key();
        let start = Arc::new(Barrier::new(RIVALS));
        let rivals: Vec<_> = (0..RIVALS)
            .map(|rival| {
                let (storage, start) = (subject.storage.clone(), start.clone());
                subject.spawn(async move {
                    let record = answer(&format!("by rival {rival}"));
                    start.wait().await;
                    let held = storage.complete(&key, Token::random(), &record, LONG).await;
                    (fine(held), record)
                })
            })
            .collect();
        let mut stored = Vec::new();
        for rival in rivals {
            let (held, record) = rival.soon("`complete` did not return").await;
            if held == Held::Yes {
                stored.push(record);
            }
        }
        let [record] = &stored[..] else {
            panic!(
                "{} of {RIVALS} concurrent `complete`s were Yes: retries get the answer of only one of those executions",
                stored.len()
            );
        };
        subject
            .assert_completed(
                &key,
                record,
                "a `complete` that was Lost changed the record",
            )
            .await;
    }
}

/// `complete` repeated with the same token is `Yes`: a driver resends a call that got no answer (rule 2).
pub async fn complete_is_idempotent_by_token<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("once");
    let (key, token) = subject.completed(&record, LONG).await;
    for _ in 0..2 {
        let again = subject.complete(&key, token, &record).await;
        assert_eq!(
            again,
            Held::Yes,
            "a repeated `complete` was Lost: its holder believes that another ran the operation too"
        );
    }
    subject
        .assert_completed(&key, &record, "a repeated `complete` changed the record")
        .await;
}

/// A repeated `complete` keeps the record of the first (rule 2).
pub async fn complete_keeps_the_first_record<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let first = answer("first");
    let (key, token) = subject.completed(&first, LONG).await;
    let again = subject.complete(&key, token, &answer("second")).await;
    assert_eq!(again, Held::Yes, "a repeated `complete` was Lost");
    subject
        .assert_completed(
            &key,
            &first,
            "a repeated `complete` replaced the first record: two clients get two answers",
        )
        .await;
}

/// A repeated `complete` restarts the TTL of the first record with its own. That is how a tombstone outlives an operation that was
/// given up and still runs (rule 2).
pub async fn complete_repeated_restarts_the_ttl<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let first = answer("first");
    let (key, token) = subject.completed(&first, subject.units(10)).await;
    subject.pass(5).await;
    let again = subject
        .complete_for(&key, token, &answer("second"), subject.units(12))
        .await;
    assert_eq!(again, Held::Yes, "a repeated `complete` was Lost");
    subject.pass(6).await;
    subject
        .assert_completed(
            &key,
            &first,
            "a record left with its first TTL though `complete` was repeated: an operation that still runs can run again",
        )
        .await;
    subject.pass(7).await;
    subject
        .assert_free(&key, "a record outlived the TTL of the repeated `complete`")
        .await;
}

/// `complete` stores the record if the key is absent: the answer survives a storage that lost the claim (rule 4).
pub async fn complete_when_absent<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    assert!(
        subject.remove(&key).await,
        "`remove` did not find the claim"
    );
    let record = answer("late");
    let held = subject.complete(&key, token, &record).await;
    assert_eq!(
        held,
        Held::Yes,
        "`complete` of an absent key was Lost: the operation ran, and a retry runs it again"
    );
    subject
        .assert_completed(
            &key,
            &record,
            "`complete` of an absent key was Yes and stored something else",
        )
        .await;
}

/// `complete` after the lease is over stores the record if nobody took the key (rule 4).
pub async fn complete_after_expiry_if_untaken<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(2)).await;
    subject.pass(3).await;
    let record = answer("slow");
    let held = subject.complete(&key, token, &record).await;
    assert_eq!(
        held,
        Held::Yes,
        "`complete` of a late holder was Lost though nobody took the key: a retry runs the operation again"
    );
    subject
        .assert_completed(
            &key,
            &record,
            "`complete` of a late holder was Yes and stored something else",
        )
        .await;
}

/// `complete` is `Lost` once another token holds the key, and leaves that claim alone (rule 4).
pub async fn complete_lost_to_a_new_holder<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, late) = subject.claimed_for(subject.units(2)).await;
    subject.pass(3).await;
    let holder = Token::random();
    let begin = subject.begin(&key, holder).await;
    assert_eq!(
        begin,
        Begin::Acquired,
        "the lease was over, and the key not free"
    );

    let held = subject.complete(&key, late, &answer("late")).await;
    assert_eq!(
        held,
        Held::Lost,
        "`complete` of a holder that had lost the key was Yes: a late answer stands for what its successor does"
    );
    subject
        .assert_claimed(
            &key,
            "a `complete` that was Lost ended the new holder's claim",
        )
        .await;
    let record = answer("by the new holder");
    let held = subject.complete(&key, holder, &record).await;
    assert_eq!(
        held,
        Held::Yes,
        "one who had lost the key took it back from its new holder"
    );
    subject
        .assert_completed(
            &key,
            &record,
            "a `complete` that was Lost stored its record",
        )
        .await;
}

/// `complete` is `Lost` once another token completed the key, and keeps that record (rule 4).
pub async fn complete_lost_to_a_record<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("first");
    let (key, _) = subject.completed(&record, LONG).await;
    let held = subject
        .complete(&key, Token::random(), &answer("second"))
        .await;
    assert_eq!(
        held,
        Held::Lost,
        "`complete` of a key that another completed was Yes: two clients get two answers"
    );
    subject
        .assert_completed(
            &key,
            &record,
            "the record of a completed operation was overwritten",
        )
        .await;
}

/// A completed key is `Completed` for every token, the one that completed it included (rules 1 and 6).
pub async fn completed_for_every_token<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("done");
    let (key, token) = subject.completed(&record, LONG).await;
    for token in [token, Token::random()] {
        let begin = subject.begin(&key, token).await;
        assert_eq!(
            begin,
            Begin::Completed(record.clone()),
            "`begin` of a completed key did not find its record: the operation runs again"
        );
    }
}

/// A record expires with its TTL, and then the key is free (rule 6).
pub async fn ttl_expires_and_not_before<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let record = answer("for a while");
    let (key, _) = subject.completed(&record, subject.units(10)).await;
    subject.pass(5).await;
    subject
        .assert_completed(
            &key,
            &record,
            "a record was gone at half of its TTL: a retry runs again",
        )
        .await;
    subject.pass(6).await;
    subject
        .assert_free(
            &key,
            "a record outlived its TTL: a key that may be used again is answered from the past",
        )
        .await;
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
        subject
            .assert_completed(&key, record, "`replace` did not replace the record")
            .await;
    }
}

/// `replace` does nothing to a free key or a claim (rule 7).
pub async fn replace_leaves_claims_and_free_keys<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    subject.replace(&key, &answer("out of nowhere"), LONG).await;
    subject
        .assert_free(
            &key,
            "`replace` stored a record under a free key: its operation never runs",
        )
        .await;

    let (key, token) = subject.claimed_for(subject.units(10)).await;
    subject.replace(&key, &answer("too early"), LONG).await;
    subject
        .assert_claimed(&key, "`replace` ended a running claim")
        .await;
    let held = subject.renew(&key, token, subject.units(10)).await;
    assert_eq!(held, Held::Yes, "`replace` took a claim from its holder");
    subject.pass(11).await;
    subject
        .assert_free(&key, "`replace` changed the lease of a running claim")
        .await;
}

/// `replace` restarts the TTL with its own (rule 7).
pub async fn replace_restarts_the_ttl<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, _) = subject.completed(&answer("first"), subject.units(10)).await;
    subject.pass(5).await;
    let second = answer("second");
    subject.replace(&key, &second, subject.units(12)).await;
    subject.pass(6).await;
    subject
        .assert_completed(
            &key,
            &second,
            "a replaced record left with the TTL of the first: a retry runs again",
        )
        .await;
    subject.pass(7).await;
    subject
        .assert_free(&key, "a replaced record outlived its TTL")
        .await;
}

/// `remove` takes records and claims, says whether there was one, and leaves the key free.
pub async fn remove_takes_records_and_claims<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    assert!(
        !subject.remove(&key).await,
        "`remove` found something under a free key"
    );

    let (claimed, token) = subject.claimed().await;
    assert!(
        subject.remove(&claimed).await,
        "`remove` did not find a claim"
    );
    let held = subject.renew(&claimed, token, LONG).await;
    assert_eq!(held, Held::Lost, "a removed claim could be renewed");

    let (completed, _) = subject.completed(&answer("done"), LONG).await;
    assert!(
        subject.remove(&completed).await,
        "`remove` did not find a record"
    );
    for key in [claimed, completed] {
        subject
            .assert_free(
                &key,
                "`remove` left something: the key that an operator cleared stays blocked",
            )
            .await;
        assert!(
            !subject.remove(&key).await,
            "`remove` found what it had removed"
        );
    }

    let (key, _) = subject
        .completed(&answer("for a while"), subject.units(2))
        .await;
    subject.pass(3).await;
    assert!(
        !subject.remove(&key).await,
        "`remove` found a record whose TTL was over"
    );
}

/// `get` changes nothing.
pub async fn get_changes_nothing<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    assert_eq!(
        subject.get(&key).await,
        None,
        "`get` found something under a free key"
    );
    subject
        .assert_free(&key, "`get` of a free key left something")
        .await;

    let (key, token) = subject.claimed().await;
    for _ in 0..2 {
        let entry = subject.get(&key).await;
        assert!(
            matches!(entry, Some(Entry::Claimed { .. })),
            "`get` found {entry:?} instead of a claim"
        );
    }
    let record = answer("done");
    let held = subject.complete(&key, token, &record).await;
    assert_eq!(held, Held::Yes, "`get` took a claim from its holder");
    for _ in 0..2 {
        let entry = subject.get(&key).await;
        assert_eq!(entry, Some(Entry::Completed(record.clone())));
    }
}

/// Records are returned as they were stored: statuses, header bytes, their order and repeats, bodies of every kind and size,
/// fingerprints, tombstones.
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
        let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_bytes(value))
        else {
            panic!("the suite's own header {name} is not one");
        };
        headers.append(name, value);
    }
    let long: Bytes = (0..1 << 20_u32).map(|at| (at ^ (at >> 8)) as u8).collect();
    let every_byte: Bytes = (0..=255_u8).collect();
    let bodies = [
        Bytes::new(),
        Bytes::from_static(b"\0"),
        Bytes::from_static(b"{\"id\": \"\xc3\xa9\"}\r\n\r\n"),
        every_byte,
        // A part of something larger.
        long.slice(5..77),
        long,
    ];

    let mut records = Vec::new();
    for (at, body) in bodies.into_iter().enumerate() {
        let status = [200, 201, 204, 303, 422, 599, 999][at];
        let Ok(status) = StatusCode::from_u16(status) else {
            panic!("the suite's own status {status} is not one");
        };
        let headers = if at % 2 == 0 {
            headers.clone()
        } else {
            HeaderMap::new()
        };
        records.push(Outcome::Response(StoredResponse::new(
            status, &headers, body,
        )));
    }
    records.extend(
        [
            TombstoneReason::ResponseTooLarge,
            TombstoneReason::StreamBroken,
            TombstoneReason::EventStream,
            TombstoneReason::Trailers,
            TombstoneReason::Streaming,
            TombstoneReason::MaxHold,
            TombstoneReason::HandlerFailed,
        ]
        .map(Outcome::Tombstone),
    );

    for (at, outcome) in (0_u8..).zip(records) {
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
        if let (Outcome::Response(found), Outcome::Response(stored)) =
            (&found.outcome, &record.outcome)
        {
            assert!(
                found.headers().iter().eq(stored.headers().iter()),
                "the headers changed: {:?} instead of {:?}",
                found.headers(),
                stored.headers()
            );
            assert!(found.body() == stored.body(), "the body changed");
        }
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
    let claim = NewClaim {
        token: Token::random(),
        fingerprint: None,
        lease: LONG,
    };
    for _ in 0..2 {
        assert_unreadable("begin", subject.storage.begin(&key, &claim).await);
        assert_unreadable("get", subject.storage.get(&key).await);
    }
    // It may be told that it does not hold the key. It must not get the key.
    if let Ok(held) = subject
        .storage
        .complete(&key, Token::random(), &answer("other"), LONG)
        .await
    {
        assert_eq!(
            held,
            Held::Lost,
            "`complete` overwrote a record that it can't read"
        );
    }
    if let Ok(held) = subject.storage.release(&key, token).await {
        assert_eq!(
            held,
            Held::Lost,
            "`release` took a record away that it can't read"
        );
    }
    assert_unreadable("begin", subject.storage.begin(&key, &claim).await);

    assert!(
        subject.remove(&key).await,
        "`remove` did not find what can't be read"
    );
    subject
        .assert_free(
            &key,
            "`remove` left what can't be read: the key stays blocked until its TTL is over",
        )
        .await;
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
        let claim = NewClaim {
            token,
            fingerprint: None,
            lease: LONG,
        };
        drop_after(polls, subject.storage.begin(&key, &claim)).await;
        let begin = subject.begin(&key, token).await;
        assert_eq!(
            begin,
            Begin::Acquired,
            "a dropped `begin` is in its own way"
        );

        drop_after(polls, subject.storage.renew(&key, token, LONG)).await;
        subject
            .assert_claimed(
                &key,
                "a dropped `renew` ended the claim: a duplicate may run",
            )
            .await;
        let held = subject.renew(&key, token, LONG).await;
        assert_eq!(
            held,
            Held::Yes,
            "a dropped `renew` cost its holder the claim"
        );

        drop_after(polls, subject.storage.wait(&key, LONG)).await;
        drop_after(polls, subject.storage.get(&key)).await;
        subject
            .assert_claimed(
                &key,
                "a dropped `get` or `wait` ended the claim: a duplicate may run",
            )
            .await;

        drop_after(polls, subject.storage.complete(&key, token, &first, LONG)).await;
        let entry = subject.get(&key).await;
        assert!(
            entry.is_some(),
            "a dropped `complete` left the key free: a retry runs the operation again"
        );
        let held = subject.complete(&key, token, &first).await;
        assert_eq!(
            held,
            Held::Yes,
            "a dropped `complete` is in its own way: the answer is lost"
        );
        subject
            .assert_completed(
                &key,
                &first,
                "a dropped `complete` left something else than its record",
            )
            .await;

        drop_after(polls, subject.storage.replace(&key, &second, LONG)).await;
        let Some(Entry::Completed(found)) = subject.get(&key).await else {
            panic!("a dropped `replace` took the record away: a retry runs again");
        };
        assert!(
            found == first || found == second,
            "a dropped `replace` left something between the two records"
        );
        subject.replace(&key, &second, LONG).await;
        subject
            .assert_completed(
                &key,
                &second,
                "`replace` did not work after one that was dropped",
            )
            .await;

        drop_after(polls, subject.storage.remove(&key)).await;
        subject.remove(&key).await;
        subject
            .assert_free(&key, "a dropped `remove` keeps the key from being cleared")
            .await;

        let (key, token) = subject.claimed().await;
        drop_after(polls, subject.storage.release(&key, token)).await;
        // `Lost` if the first took effect.
        let _ = subject.release(&key, token).await;
        subject
            .assert_free(&key, "a dropped `release` keeps the key from being freed")
            .await;
    }
}

/// Polls `call` up to `polls` times, yields to other tasks in between, and drops it.
async fn drop_after<T>(polls: u32, call: impl Future<Output = T>) {
    let mut call = pin!(call);
    for _ in 0..polls {
        if poll_once(call.as_mut()).await.is_ready() {
            return;
        }
        breathe().await;
    }
}
