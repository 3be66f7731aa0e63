//! Rules of claims: which token holds a key, and for how long.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is what a rule does, and the module's documentation says when"
)]

use std::{sync::Arc, time::Duration};

use tokio::sync::Barrier;

use super::{
    Harness,
    harness::{LONG, Subject, answer, fine, fingerprint, fresh_key},
};
use crate::{Begin, Entry, Held, NewClaim, Storage, Token};

/// Of many concurrent `begin`s of a free key exactly one is `Acquired`, and the others are `InFlight` (rule 1).
pub async fn begin_is_exclusive<H: Harness>(harness: &H) {
    const RIVALS: usize = 16;
    let subject = Subject::new(harness).await;
    for _ in 0..8 {
        let key = fresh_key();
        let start = Arc::new(Barrier::new(RIVALS));
        let rivals: Vec<_> = (0..RIVALS)
            .map(|_| {
                let (storage, start) = (subject.storage.clone(), start.clone());
                subject.spawn(async move {
                    let claim = NewClaim {
                        token: Token::random(),
                        fingerprint: None,
                        lease: LONG,
                    };
                    start.wait().await;
                    fine(storage.begin(&key, &claim).await)
                })
            })
            .collect();
        let mut acquired = 0;
        for rival in rivals {
            match rival.soon("`begin` did not return").await {
                Begin::Acquired => acquired += 1,
                Begin::InFlight { .. } => {}
                Begin::Completed(_) => panic!("`begin` found a record that nobody stored"),
            }
        }
        assert_eq!(
            acquired, 1,
            "{acquired} of {RIVALS} concurrent `begin`s of one key were Acquired: that many executions of one request"
        );
    }
}

/// `begin` with the token that holds the key is `Acquired` again: a driver resends a call that got no answer (rule 2).
pub async fn begin_is_idempotent_by_token<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    for _ in 0..2 {
        let again = subject.begin(&key, token).await;
        assert_eq!(
            again,
            Begin::Acquired,
            "a repeated `begin` was refused because of its own claim: after a lost answer nobody runs the operation"
        );
    }
    subject
        .assert_claimed(
            &key,
            "a repeated `begin` gave up the claim: a duplicate may run",
        )
        .await;
    let held = subject.release(&key, token).await;
    assert_eq!(
        held,
        Held::Yes,
        "a repeated `begin` took the claim from its holder"
    );
    subject
        .assert_free(
            &key,
            "a repeated `begin` left a second claim: the key stays blocked",
        )
        .await;
}

/// `begin` and `get` return the fingerprint of the running operation, and at most the rest of its lease (rule 1).
pub async fn begin_tells_of_the_running_claim<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    for expected in [None, Some(fingerprint(0x00)), Some(fingerprint(0xc3))] {
        let key = fresh_key();
        let claim = |fingerprint| NewClaim {
            token: Token::random(),
            fingerprint,
            lease: LONG,
        };
        let begin = fine(subject.storage.begin(&key, &claim(expected)).await);
        assert_eq!(begin, Begin::Acquired, "a free key was not Acquired");

        let begin = fine(
            subject
                .storage
                .begin(&key, &claim(Some(fingerprint(0x11))))
                .await,
        );
        let Begin::InFlight {
            fingerprint,
            lease_left,
        } = begin
        else {
            panic!("`begin` was {begin:?} under another's claim: two executions of one key");
        };
        assert_eq!(
            fingerprint, expected,
            "the running claim's fingerprint changed: a key that is reused for another request is not noticed, or a duplicate is refused as one"
        );
        assert_sane(lease_left);

        let entry = subject.get(&key).await;
        let Some(Entry::Claimed {
            fingerprint,
            lease_left,
        }) = entry
        else {
            panic!("`get` found {entry:?} instead of the claim");
        };
        assert_eq!(
            fingerprint, expected,
            "`get` shows another fingerprint than the claim's"
        );
        assert_sane(lease_left);
    }
}

fn assert_sane(lease_left: Option<Duration>) {
    assert!(
        lease_left.is_none_or(|left| left <= LONG),
        "{lease_left:?} of the lease are left, more than was asked for: waiters and Retry-After would be wrong"
    );
}

/// A call for one key changes no other key, even if the two differ in a single bit.
pub async fn keys_are_independent<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let record = answer("of the first key");
    for bit in [0, 7, 100, 255] {
        let mut bytes = *key.as_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let near = crate::EncodedKey::from_bytes(bytes);
        subject
            .assert_free(
                &near,
                "a claim blocks another key: unrelated requests are refused",
            )
            .await;
    }
    let (other, other_token) = subject.claimed().await;
    assert_eq!(subject.complete(&key, token, &record).await, Held::Yes);
    subject
        .assert_claimed(
            &other,
            "completing one key ended the claim of another: a duplicate may run",
        )
        .await;
    let held = subject.renew(&key, other_token, LONG).await;
    assert_eq!(
        held,
        Held::Lost,
        "a token works under a key that it does not hold"
    );
    assert!(
        subject.remove(&other).await,
        "`remove` did not find the claim"
    );
    subject
        .assert_completed(
            &key,
            &record,
            "removing one key changed the record of another",
        )
        .await;
}

/// A claim that is not renewed ends with its lease, and no earlier (rule 3).
pub async fn lease_expires_and_not_before<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, _) = subject.claimed_for(subject.units(10)).await;
    subject.pass(5).await;
    subject
        .assert_claimed(
            &key,
            "a claim ended at half of its lease: a duplicate runs beside the original",
        )
        .await;
    subject.pass(6).await;
    let entry = subject.get(&key).await;
    assert_eq!(entry, None, "`get` shows a claim whose lease is over");
    let begin = subject.begin(&key, Token::random()).await;
    assert_eq!(
        begin,
        Begin::Acquired,
        "the claim of a dead holder outlived its lease: the key stays blocked"
    );
}

/// After `renew` the claim's lease ends one lease from now (rule 3).
pub async fn renew_extends<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(10)).await;
    for _ in 0..3 {
        subject.pass(5).await;
        let held = subject.renew(&key, token, subject.units(10)).await;
        assert_eq!(
            held,
            Held::Yes,
            "the holder's `renew` was Lost: its execution would be given up"
        );
    }
    subject.pass(5).await;
    subject
        .assert_claimed(
            &key,
            "a renewed claim ended with its first lease: a duplicate runs beside a slow original",
        )
        .await;
    subject.pass(6).await;
    let begin = subject.begin(&key, Token::random()).await;
    assert_eq!(
        begin,
        Begin::Acquired,
        "a renewed claim outlived its last lease: after a crash the key stays blocked"
    );
}

/// `renew` with a token that does not hold the key is `Lost` and changes nothing (rule 5).
pub async fn renew_by_a_stranger_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(10)).await;
    let held = subject.renew(&key, Token::random(), LONG).await;
    assert_eq!(
        held,
        Held::Lost,
        "a stranger's `renew` was taken for the holder's: who lost the key never hears of it"
    );
    let held = subject.renew(&key, token, subject.units(10)).await;
    assert_eq!(
        held,
        Held::Yes,
        "a stranger's `renew` took the claim from its holder"
    );
    subject.pass(11).await;
    subject
        .assert_free(
            &key,
            "a stranger's `renew` extended the claim: the key stays blocked",
        )
        .await;
}

/// `renew` is `Lost` where there is no claim, and makes none (rule 5).
pub async fn renew_without_a_claim_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    let held = subject.renew(&key, Token::random(), LONG).await;
    assert_eq!(held, Held::Lost, "`renew` of a key without a claim was Yes");
    subject
        .assert_free(
            &key,
            "`renew` made a claim: the key is blocked, and nobody runs",
        )
        .await;

    let record = answer("done");
    let (key, token) = subject.completed(&record, LONG).await;
    let held = subject.renew(&key, token, subject.units(1)).await;
    assert_eq!(held, Held::Lost, "`renew` of a completed key was Yes");
    subject.pass(2).await;
    subject
        .assert_completed(
            &key,
            &record,
            "`renew` changed the TTL of a record: a retry runs again",
        )
        .await;
}

/// `release` ends the claim of its token: the key is free for the next (rule 5).
pub async fn release_frees_the_key<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let held = subject.release(&key, token).await;
    assert_eq!(held, Held::Yes, "the holder's `release` was Lost");
    subject
        .assert_free(
            &key,
            "a released key is not free: a retry after an unstored answer is refused",
        )
        .await;
}

/// `release` with a token that does not hold the key is `Lost` and changes nothing (rule 5).
pub async fn release_by_a_stranger_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let held = subject.release(&key, Token::random()).await;
    assert_eq!(
        held,
        Held::Lost,
        "a stranger's `release` was taken for the holder's: a duplicate runs beside it"
    );
    subject
        .assert_claimed(
            &key,
            "a stranger released the claim: two executions of one key",
        )
        .await;
    let held = subject.renew(&key, token, LONG).await;
    assert_eq!(
        held,
        Held::Yes,
        "a stranger's `release` took the claim from its holder"
    );
}

/// `release` is `Lost` where there is no claim, and takes no record away (rule 5).
pub async fn release_without_a_claim_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let held = subject.release(&fresh_key(), Token::random()).await;
    assert_eq!(
        held,
        Held::Lost,
        "`release` of a key without a claim was Yes"
    );

    let record = answer("done");
    let (key, token) = subject.completed(&record, LONG).await;
    for token in [token, Token::random()] {
        let held = subject.release(&key, token).await;
        assert_eq!(held, Held::Lost, "`release` of a completed key was Yes");
    }
    subject
        .assert_completed(
            &key,
            &record,
            "`release` took a record away: a retry runs again",
        )
        .await;
}

/// A holder whose lease is over and whose key another took can't change anything (rules 3 and 5).
pub async fn a_lost_claim_changes_nothing<H: Harness>(harness: &H) {
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

    let held = subject.renew(&key, late, LONG).await;
    assert_eq!(
        held,
        Held::Lost,
        "a holder renewed a claim that another had taken: two executions of one key go on"
    );
    let held = subject.release(&key, late).await;
    assert_eq!(
        held,
        Held::Lost,
        "a holder released a claim that another had taken"
    );
    let begin = subject.begin(&key, late).await;
    assert!(
        matches!(begin, Begin::InFlight { .. }),
        "`begin` was {begin:?} for a holder that had lost the key: two executions at once"
    );
    let held = subject.renew(&key, holder, LONG).await;
    assert_eq!(
        held,
        Held::Yes,
        "one who had lost the key took it back from its new holder"
    );
}
