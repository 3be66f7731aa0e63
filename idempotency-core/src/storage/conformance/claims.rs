//! Rules of claims: which token holds a key, and for how long.

#![expect(
    clippy::missing_panics_doc,
    reason = "to panic is what a rule does, and the module's documentation says when"
)]

use std::sync::Arc;

use super::{
    Harness,
    harness::{Found, LONG, Subject, answer, claim, fine, fingerprint, fresh_key, must},
};
use crate::{Begin, EncodedKey, Entry, Held, NewClaim, Storage, Token};

/// Of many concurrent `begin`s of a free key exactly one is `Acquired`, and the others are `InFlight` (rule 1).
pub async fn begin_is_exclusive<H: Harness>(harness: &H) {
    const RIVALS: usize = 16;
    let subject = Subject::new(harness).await;
    for _ in 0..8 {
        let key = fresh_key();
        let begin = |_, storage: Arc<H::Storage>| async move {
            fine(storage.begin(&key, &claim(Token::random(), LONG)).await)
        };
        let mut acquired = 0;
        let begun = subject.race(RIVALS, begin, "`begin` did not return").await;
        for begin in begun {
            match begin {
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
        must!(subject.begin(&key, token) => Begin::Acquired,
            "a repeated `begin` was refused because of its own claim: after a lost answer nobody runs the operation");
    }
    must!(subject.find(&key) => Found::Claim,
        "a repeated `begin` gave up the claim: a duplicate may run");
    must!(subject.release(&key, token) => Held::Yes,
        "a repeated `begin` took the claim from its holder");
    must!(subject.find(&key) => Found::Nothing,
        "a repeated `begin` left a second claim: the key stays blocked");
}

/// `begin` and `get` return the fingerprint of the running operation, and at most the rest of its lease (rule 1).
pub async fn begin_tells_of_the_running_claim<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    for expected in [None, Some(fingerprint(0x00)), Some(fingerprint(0xc3))] {
        let key = fresh_key();
        let begin = async |fingerprint| {
            let claim = NewClaim {
                fingerprint,
                ..claim(Token::random(), LONG)
            };
            fine(subject.storage.begin(&key, &claim).await)
        };
        must!(begin(expected) => Begin::Acquired, "a free key was not Acquired");

        let begun = match begin(Some(fingerprint(0x11))).await {
            Begin::InFlight {
                fingerprint,
                lease_left,
            } => (fingerprint, lease_left),
            begin => {
                panic!("`begin` was {begin:?} under another's claim: two executions of one key")
            }
        };
        let got = match subject.get(&key).await {
            Some(Entry::Claimed {
                fingerprint,
                lease_left,
            }) => (fingerprint, lease_left),
            entry => panic!("`get` found {entry:?} instead of the claim"),
        };
        for (call, (fingerprint, lease_left)) in [("begin", begun), ("get", got)] {
            assert_eq!(
                fingerprint, expected,
                "`{call}` shows another fingerprint than the running claim's: a key that is reused for another request is not noticed, or a duplicate is refused as one"
            );
            assert!(
                lease_left.is_none_or(|left| left <= LONG),
                "{lease_left:?} of the lease are left, more than was asked for: waiters and Retry-After would be wrong"
            );
        }
    }
}

/// A call for one key changes no other key, even if the two differ in a single bit.
pub async fn keys_are_independent<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    let record = answer("of the first key");
    for bit in [0, 7, 100, 255] {
        let mut bytes = *key.as_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let near = EncodedKey::from_bytes(bytes);
        must!(subject.find(&near) => Found::Nothing,
            "a claim blocks another key: unrelated requests are refused");
    }
    let (other, other_token) = subject.claimed().await;
    must!(subject.complete(&key, token, &record, LONG) => Held::Yes, "the holder's `complete` was Lost");
    must!(subject.find(&other) => Found::Claim,
        "completing one key ended the claim of another: a duplicate may run");
    must!(subject.renew(&key, other_token, LONG) => Held::Lost,
        "a token works under a key that it does not hold");
    must!(subject.remove(&other) => true, "`remove` did not find the claim");
    must!(subject.find(&key) => Found::Record(record.clone()),
        "removing one key changed the record of another");
}

/// A claim that is not renewed ends with its lease, and no earlier (rule 3).
pub async fn lease_expires_and_not_before<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, _) = subject.claimed_for(subject.units(10)).await;
    subject.pass(5).await;
    must!(subject.find(&key) => Found::Claim,
        "a claim ended at half of its lease: a duplicate runs beside the original");
    subject.pass(6).await;
    must!(subject.get(&key) => None, "`get` shows a claim whose lease is over");
    must!(subject.begin(&key, Token::random()) => Begin::Acquired,
        "the claim of a dead holder outlived its lease: the key stays blocked");
}

/// After `renew` the claim's lease ends one lease from now (rule 3).
pub async fn renew_extends<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(10)).await;
    for _ in 0..3 {
        subject.pass(5).await;
        must!(subject.renew(&key, token, subject.units(10)) => Held::Yes,
            "the holder's `renew` was Lost: its execution would be given up");
    }
    subject.pass(5).await;
    must!(subject.find(&key) => Found::Claim,
        "a renewed claim ended with its first lease: a duplicate runs beside a slow original");
    subject.pass(6).await;
    must!(subject.begin(&key, Token::random()) => Begin::Acquired,
        "a renewed claim outlived its last lease: after a crash the key stays blocked");
}

/// `renew` with a token that does not hold the key is `Lost` and changes nothing (rule 5).
pub async fn renew_by_a_stranger_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed_for(subject.units(10)).await;
    must!(subject.renew(&key, Token::random(), LONG) => Held::Lost,
        "a stranger's `renew` was taken for the holder's: who lost the key never hears of it");
    must!(subject.renew(&key, token, subject.units(10)) => Held::Yes,
        "a stranger's `renew` took the claim from its holder");
    subject.pass(11).await;
    must!(subject.find(&key) => Found::Nothing,
        "a stranger's `renew` extended the claim: the key stays blocked");
}

/// `renew` is `Lost` where there is no claim, and makes none (rule 5).
pub async fn renew_without_a_claim_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let key = fresh_key();
    must!(subject.renew(&key, Token::random(), LONG) => Held::Lost,
        "`renew` of a key without a claim was Yes");
    must!(subject.find(&key) => Found::Nothing,
        "`renew` made a claim: the key is blocked, and nobody runs");

    let record = answer("done");
    let (key, token) = subject.completed(&record, LONG).await;
    must!(subject.renew(&key, token, subject.units(1)) => Held::Lost,
        "`renew` of a completed key was Yes");
    subject.pass(2).await;
    must!(subject.find(&key) => Found::Record(record.clone()),
        "`renew` changed the TTL of a record: a retry runs again");
}

/// `release` ends the claim of its token: the key is free for the next (rule 5).
pub async fn release_frees_the_key<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    must!(subject.release(&key, token) => Held::Yes, "the holder's `release` was Lost");
    must!(subject.find(&key) => Found::Nothing,
        "a released key is not free: a retry after an unstored answer is refused");
}

/// `release` with a token that does not hold the key is `Lost` and changes nothing (rule 5).
pub async fn release_by_a_stranger_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, token) = subject.claimed().await;
    must!(subject.release(&key, Token::random()) => Held::Lost,
        "a stranger's `release` was taken for the holder's: a duplicate runs beside it");
    must!(subject.find(&key) => Found::Claim,
        "a stranger released the claim: two executions of one key");
    must!(subject.renew(&key, token, LONG) => Held::Yes,
        "a stranger's `release` took the claim from its holder");
}

/// `release` is `Lost` where there is no claim, and takes no record away (rule 5).
pub async fn release_without_a_claim_is_lost<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    must!(subject.release(&fresh_key(), Token::random()) => Held::Lost,
        "`release` of a key without a claim was Yes");

    let record = answer("done");
    let (key, token) = subject.completed(&record, LONG).await;
    for token in [token, Token::random()] {
        must!(subject.release(&key, token) => Held::Lost, "`release` of a completed key was Yes");
    }
    must!(subject.find(&key) => Found::Record(record.clone()),
        "`release` took a record away: a retry runs again");
}

/// A holder whose lease is over and whose key another took can't change anything (rules 3 and 5).
pub async fn a_lost_claim_changes_nothing<H: Harness>(harness: &H) {
    let subject = Subject::new(harness).await;
    let (key, late, holder) = subject.taken_over().await;
    must!(subject.renew(&key, late, LONG) => Held::Lost,
        "a holder renewed a claim that another had taken: two executions of one key go on");
    must!(subject.release(&key, late) => Held::Lost,
        "a holder released a claim that another had taken");
    let begin = subject.begin(&key, late).await;
    assert!(
        matches!(begin, Begin::InFlight { .. }),
        "`begin` was {begin:?} for a holder that had lost the key: two executions at once"
    );
    must!(subject.renew(&key, holder, LONG) => Held::Yes,
        "one who had lost the key took it back from its new holder");
}
