//! What fuzzing has gathered holds for every input again, also where no fuzzer can be had.

use std::{fs, path::Path};

use idempotency_tests::fuzz::TARGETS;

#[test]
fn every_input_of_every_corpus_holds() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for input in fs::read_dir(corpora.join(name)).unwrap() {
            let path = input.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            let caught = std::panic::catch_unwind(|| target(&bytes));
            assert!(caught.is_ok(), "{} no longer holds", path.display());
            inputs += 1;
        }
        assert!(inputs >= 10, "the corpus `{name}` has {inputs} inputs");
    }
}
