//! Golden vectors: what earlier versions wrote, this one must still compute and read.
//!
//! A test that fails here means that a deployment of this version finds none of the records made
//! before it, and runs every retry again. **Don't update the vectors**; a changed encoding is a
//! breaking change (see `src/encoder.rs` and `src/codec.rs`).
//!
//! The vectors were computed apart from this crate, from the layout that its docs describe.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use idempotency_core::{
    BasicKeyEncoder, EncodedKey, Fingerprint, FingerprintKeyEncoder, Key, KeyEncoder,
    KeyOnlyEncoder, Outcome, Record, RequestView, Scope, StoredResponse, TombstoneReason,
};

fn key(text: &'static str) -> Key {
    Key::parse(&HeaderValue::from_static(text)).unwrap()
}

/// Storage key and fingerprint of three requests: one with all parts, one with as few as possible,
/// and that one again with an empty scope instead of none.
fn encode_three(encoder: &dyn KeyEncoder) -> [(String, Option<String>); 3] {
    let headers = HeaderMap::new();
    let full = RequestView {
        method: &Method::POST,
        path_and_query: "/orders?source=app",
        headers: &headers,
        body: br#"{"item":"book"}"#,
        scope: Some(b"Bearer alice"),
    };
    let bare = RequestView {
        method: &Method::PATCH,
        path_and_query: "/",
        headers: &headers,
        body: b"",
        scope: None,
    };
    let empty_scope = RequestView {
        scope: Some(b""),
        ..bare
    };
    [
        (key("8e03978e-40d5-43dd-bc93-6894a57f9324"), full),
        (key("k"), bare),
        (key("k"), empty_scope),
    ]
    .map(|(key, view)| {
        let encoded = encoder.encode(&key, &view);
        (
            encoded.key.to_string(),
            encoded.fingerprint.map(|print| print.to_string()),
        )
    })
}

fn vectors(wanted: [(&str, Option<&str>); 3]) -> [(String, Option<String>); 3] {
    wanted.map(|(key, print)| (key.to_owned(), print.map(str::to_owned)))
}

#[test]
fn basic_key_encoder() {
    let wanted = vectors([
        (
            "92fc6d4c5c81d6085c2a90779d003725b0b4fcd63fe759a78f0708d140c6ca7f",
            None,
        ),
        (
            "6052425c1ef16050112e99e8ae692049d0755688c20b92b466c6234acbe33a6a",
            None,
        ),
        (
            "d6855053602baec3dc30b02cf1bbd60bc5278131f1ca2411f7e1c0bcf8264e96",
            None,
        ),
    ]);
    assert_eq!(encode_three(&BasicKeyEncoder), wanted);
}

#[test]
fn fingerprint_key_encoder() {
    let wanted = vectors([
        (
            "0aa02fca961078bfd95b25c3b871a1e8280d2b5ed6de57bd7d307b6dde62d071",
            Some("04afd8a14df69c35e92eac1e2bd8f8f099efcf7a8b5e778080aa7c6fe2a4d374"),
        ),
        (
            "2056fa749224baceba4324ef6221a0abbf236fce1c4463b88297cbfcfb96416c",
            Some("c26118eeb3e14b114f411dc0839c287f34ad39e9522f2ba6533004bc1000cfaa"),
        ),
        (
            "0ac1cf17aa60b190330ea6ab09b874b2ce22cc919dc2e02b6c5f5977a5d59068",
            Some("c26118eeb3e14b114f411dc0839c287f34ad39e9522f2ba6533004bc1000cfaa"),
        ),
    ]);
    assert_eq!(encode_three(&FingerprintKeyEncoder), wanted);
    // `.fields` may change the fingerprint and nothing else.
    let identity = FingerprintKeyEncoder.fields(|body| Cow::Borrowed(body));
    assert_eq!(encode_three(&identity), wanted);
}

#[test]
fn key_only_encoder() {
    let wanted = vectors([
        (
            "5e6ed8e20d3beaf5039cc10cfc7a9dadc35cd64455be5e7eaf224a04c2f1d98e",
            Some("c63d3c6aeaf8b064393dd416c8dbafcd9a0972bc76c429128c0bcf21212cf013"),
        ),
        (
            "c397c26dfcbbcc95273acf26de22e1ec49e5fd86a3ba0032290994f9a971dac4",
            Some("178495fc58515eaa5fef346690e1827271c1aafa7546482866674ddad2c40c34"),
        ),
        (
            "8fe113c131f7f6547453411d477f6f8b431a8c70311dc0b8328b63054625ae15",
            Some("178495fc58515eaa5fef346690e1827271c1aafa7546482866674ddad2c40c34"),
        ),
    ]);
    assert_eq!(encode_three(&KeyOnlyEncoder), wanted);
}

/// The encoded form of one part, sent with this boundary.
fn encode_form(encoder: &dyn KeyEncoder, boundary: &str) -> (String, Option<String>) {
    let content_type = format!("multipart/form-data; boundary={boundary}");
    let mut headers = HeaderMap::new();
    headers.insert("content-type", content_type.parse().unwrap());
    let body = format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"item\"\r\n\r\nbook\r\n--{boundary}--\r\n"
    );
    let view = RequestView {
        method: &Method::POST,
        path_and_query: "/orders?source=app",
        headers: &headers,
        body: body.as_bytes(),
        scope: Some(b"Bearer alice"),
    };
    let encoded = encoder.encode(&key("8e03978e-40d5-43dd-bc93-6894a57f9324"), &view);
    (
        encoded.key.to_string(),
        encoded.fingerprint.map(|print| print.to_string()),
    )
}

#[test]
fn multipart_bodies() {
    let fields = FingerprintKeyEncoder.fields(|body| Cow::Borrowed(body));
    let fingerprint = (
        "0aa02fca961078bfd95b25c3b871a1e8280d2b5ed6de57bd7d307b6dde62d071",
        Some("b2baba8642460a990823d7fa8cf3e9f143295b9461f5f24c8b211b6281ed5888"),
    );
    let basic = "224349fd423526a849d404a6f50d3478ce36e1e8771819e25f3d839a91093138";
    let key_only = (
        "5e6ed8e20d3beaf5039cc10cfc7a9dadc35cd64455be5e7eaf224a04c2f1d98e",
        Some("27a8e6321937dcb958342def0df5225ea4d0df5415073ea6a84e7f0131a361b4"),
    );
    assert_form(&BasicKeyEncoder, (basic, None));
    assert_form(&FingerprintKeyEncoder, fingerprint);
    assert_form(&fields, fingerprint);
    assert_form(&KeyOnlyEncoder, key_only);
}

/// Whatever its boundary is.
#[track_caller]
fn assert_form(encoder: &dyn KeyEncoder, (key, print): (&str, Option<&str>)) {
    let wanted = (key.to_owned(), print.map(str::to_owned));
    assert_eq!(encode_form(encoder, "A1"), wanted);
    assert_eq!(encode_form(encoder, "B2"), wanted);
}

/// What the default scope makes of these headers.
fn default_scope(headers: &[(&str, &str)]) -> Vec<u8> {
    let mut request = http::Request::builder();
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (parts, ()) = request.body(()).unwrap().into_parts();
    Scope::default().of(&parts).unwrap().unwrap()
}

#[test]
fn the_default_scope() {
    let bearer = ("authorization", "Bearer alice");
    assert_eq!(default_scope(&[bearer]), b"Bearer alice");
    assert_eq!(
        default_scope(&[bearer, ("authorization", "Basic eA==")]),
        b"Bearer alice\0Basic eA=="
    );
    assert_eq!(default_scope(&[("x-api-key", "k")]), b"\nx-api-key:k");
    assert_eq!(
        default_scope(&[
            ("x-auth-token", "t"),
            ("api-key", "b"),
            ("x-api-key", "a"),
            bearer,
            ("api-key", "c"),
        ]),
        b"Bearer alice\nx-api-key:a\napi-key:b\0c\nx-auth-token:t"
    );
}

#[test]
fn keys_derived_from_a_key() {
    let derived = key("8e03978e-40d5-43dd-bc93-6894a57f9324").derive("psp-charge");
    assert_eq!(derived, "2570392a-17a4-8043-b5df-0a67ef6a5080");
    assert_eq!(key("k").derive(""), "331e4738-fd11-8f04-ad96-68bfd907f5fb");
}

#[test]
fn keys_derived_from_an_encoded_key() {
    let counting: EncodedKey = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
        .parse()
        .unwrap();
    assert_eq!(
        counting.derive("psp-charge"),
        "5a2a45a3-46ef-8a26-9580-9b52be7986a0"
    );
    let zero = EncodedKey::from_bytes([0; 32]);
    assert_eq!(zero.derive(""), "fa3f7a87-a303-8cbd-8d2c-7ab4f8f7c00e");
}

/// Both ways: what is written now, and that what was written is still read.
fn assert_record(record: &Record, hex: &str) {
    let wanted: Vec<u8> = hex
        .as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    assert_eq!(record.encode(), wanted);
    assert_eq!(&Record::decode(Bytes::from(wanted)).unwrap(), record);
}

#[test]
fn record_of_a_response() {
    let mut headers = HeaderMap::new();
    headers.append("content-type", HeaderValue::from_static("application/json"));
    headers.append("link", HeaderValue::from_static("</a>"));
    headers.append("link", HeaderValue::from_static("</b>"));
    headers.append("etag", HeaderValue::from_static("\"7\""));
    headers.append("x-name", HeaderValue::from_bytes(b"caf\xe9").unwrap());
    let body: &[u8] = b"{\"id\":7}\x00\xff";
    let record = Record {
        fingerprint: Some(Fingerprint::from_bytes([0xab; 32])),
        outcome: Outcome::Response(StoredResponse::new(StatusCode::CREATED, &headers, body)),
    };
    assert_record(
        &record,
        "01000000e110a2c5c87b2266696e6765727072696e74223a22616261626162616261626162616261\
         62616261626162616261626162616261626162616261626162616261626162616261626162616261\
         626162616261626162222c22737461747573223a3230312c2268656164657273223a5b5b22636f6e\
         74656e742d74797065222c226170706c69636174696f6e2f6a736f6e225d2c5b226c696e6b222c22\
         3c2f613e225d2c5b226c696e6b222c223c2f623e225d2c5b2265746167222c225c22375c22225d2c\
         5b22782d6e616d65222c7b22626173653634223a225932466d36513d3d227d5d5d7d7b226964223a\
         377d00ff",
    );
}

#[test]
fn record_of_an_empty_response() {
    let headers = HeaderMap::new();
    let response = StoredResponse::new(StatusCode::NO_CONTENT, &headers, "");
    let record = Record {
        fingerprint: None,
        outcome: Outcome::Response(response),
    };
    assert_record(&record, "010000000e6bbbd2227b22737461747573223a3230347d");
}

#[test]
fn record_of_a_tombstone() {
    let record = Record {
        fingerprint: Some(Fingerprint::from_bytes([0xab; 32])),
        outcome: Outcome::Tombstone(TombstoneReason::ResponseTooLarge),
    };
    assert_record(
        &record,
        "0100000073a884ab737b2266696e6765727072696e74223a22616261626162616261626162616261\
         62616261626162616261626162616261626162616261626162616261626162616261626162616261\
         626162616261626162222c22746f6d6273746f6e65223a22726573706f6e73652d746f6f2d6c6172\
         6765227d",
    );
}
