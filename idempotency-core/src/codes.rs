//! Enums whose variants have a fixed code, for logs, metrics and records.

/// Makes the enum, the list of its variants, and `as_str` with the docs that are given to it.
macro_rules! codes {
    (
        $(#[$attribute:meta])*
        pub enum $name:ident {
            $($(#[$variant_doc:meta])* $variant:ident = $code:literal,)*
        }
        $(#[$code_doc:meta])*
        pub fn as_str;
    ) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)*
        }

        impl $name {
            #[allow(dead_code, reason = "only some of these enums are read back from their codes")]
            pub(crate) const ALL: &[Self] = &[$(Self::$variant),*];

            $(#[$code_doc])*
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $code,)*
                }
            }
        }
    };
}
pub(crate) use codes;
