//! What the attributes become.
//!
//! ```text
//! pub const create_order: Hidden = Hidden { seat: Seat::FREE };   // docs, deprecation
//! pub struct Hidden { seat: Seat }
//! const _: () = {
//!     async fn create_order(…) -> … { … }                         // all other attributes
//!     impl Hidden { NAME, policy(), pub invoke(…) }
//!     impl Clone for Hidden { … }                                 // announces the policy
//!     impl Handler<(M, …), S> for Hidden { … }                    // axum's own bounds
//! };
//! ```
//!
//! A constant lives among the values only, so a module may have the handler's name. The block gives the function its own
//! name back, for recursion and for what other attributes make of it. Nothing else in the block has a name that the body of
//! the function could see.

use proc_macro2::{Ident, Span, TokenStream};
use quote::{format_ident, quote, quote_spanned};
use syn::{ReturnType, Signature, ext::IdentExt, spanned::Spanned};

use crate::{
    Attribute,
    args::{KeyArgs, Policy},
    item::{HandlerFn, without_our_attributes},
};

/// Expands `attribute` with `args` on `item`. With an error the item stays a plain function.
pub(crate) fn expand(attribute: Attribute, args: TokenStream, item: TokenStream) -> TokenStream {
    let parsed = Policy::parse(attribute, args)
        .and_then(|policy| Ok((policy, HandlerFn::parse(attribute, item.clone())?)));
    match parsed {
        Ok((policy, handler)) => handler_with_policy(&policy, &handler),
        Err(error) => {
            let error = error.into_compile_error();
            let item = without_our_attributes(item);
            quote!(#error #item)
        }
    }
}

fn handler_with_policy(policy: &Policy, handler: &HandlerFn) -> TokenStream {
    let HandlerFn {
        attributes,
        visibility,
        signature,
        body,
        ..
    } = handler;
    let name = &signature.ident;
    let hidden = format_ident!("__idempotency_{}", name.unraw());

    let private = private();
    let everywhere = &attributes.everywhere;
    let on_constant = &attributes.constant;
    let on_block = &attributes.block;
    let on_function = &attributes.function;
    let conflicts = &attributes.conflicts;

    // Spanned as the function: what lints say about the item (dead, undocumented, …) they say about the user's line.
    let constant = quote_spanned! {signature.fn_token.span=>
        const #name: #hidden = #hidden { seat: #private::Seat::FREE };
    };
    let inherent = inherent_impl(policy, handler, &hidden);
    let clone = clone_impl(&hidden);
    let handler_impl = handler_impl(handler, &hidden);
    let exempt_checks = exempt_checks(policy, handler);

    quote! {
        #(#everywhere #conflicts)*

        #everywhere
        #on_constant
        #[allow(non_upper_case_globals)]
        #visibility #constant

        #everywhere
        #[doc(hidden)]
        #[allow(non_camel_case_types)]
        #visibility struct #hidden {
            seat: #private::Seat,
        }

        #everywhere
        #on_block
        const _: () = {
            #on_function
            #signature #body
            // One warning about a handler that no route has: the one about the constant.
            let _ = #name;

            #inherent
            #clone
            #handler_impl
            #exempt_checks
        };
    }
}

/// What the handler is called, what it wants, and how a test calls it.
fn inherent_impl(policy: &Policy, handler: &HandlerFn, hidden: &Ident) -> TokenStream {
    let private = private();
    let HandlerFn {
        visibility,
        signature: Signature { ident, output, .. },
        parameters,
        ..
    } = handler;
    let text = ident.unraw().to_string();
    let policy = match policy {
        Policy::Key(args) => key_policy(args, handler),
        Policy::Exempt => quote!(#private::KeyPolicy::exempt()),
    };
    let arguments = arguments(handler);
    let doc = format!(
        "Calls `{text}` as the function that it was written as: without a request, a key or a layer. For unit tests."
    );

    quote! {
        impl #hidden {
            const __NAME: &'static ::core::primitive::str =
                ::core::concat!(::core::module_path!(), "::", #text);

            fn __policy() -> #private::KeyPolicy {
                #policy
            }

            #[doc = #doc]
            #[allow(clippy::too_many_arguments, clippy::type_complexity)]
            #visibility async fn invoke(self, #(#arguments: #parameters),*) #output {
                #ident(#(#arguments),*).await
            }
        }
    }
}

fn key_policy(args: &KeyArgs, handler: &HandlerFn) -> TokenStream {
    let private = private();
    let constructor = if args.optional {
        quote!(optional)
    } else {
        quote!(required)
    };
    let cache_name = args
        .cache_name
        .as_ref()
        .map(|name| quote!(.cache_name(#name)));
    let ttl = args.ttl.map(|ttl| {
        let (seconds, nanos) = (ttl.as_secs(), ttl.subsec_nanos());
        quote!(.ttl(::core::time::Duration::new(#seconds, #nanos)))
    });
    let policy = quote!(#private::KeyPolicy::#constructor() #cache_name #ttl);
    if handler.parameters.is_empty() {
        return policy;
    }

    // By type, not by name: an alias or an `Option` of an extractor is found too.
    let parameters = &handler.parameters;
    quote! {
        #private::policy_with(#policy, const {
            use #private::NoNeeds as _;
            #private::Needs::NONE #(.and(#private::NeedsOf::<#parameters>::NEEDS))*
        })
    }
}

fn clone_impl(hidden: &Ident) -> TokenStream {
    quote! {
        impl ::core::clone::Clone for #hidden {
            fn clone(&self) -> Self {
                Self {
                    seat: self.seat.announce(Self::__NAME, Self::__policy),
                }
            }
        }

        impl ::core::fmt::Debug for #hidden {
            fn fmt(&self, __idempotency_f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                __idempotency_f.write_str(Self::__NAME)
            }
        }
    }
}

/// The impl that axum has for functions, on the same terms. The function runs through axum's own, too.
fn handler_impl(handler: &HandlerFn, hidden: &Ident) -> TokenStream {
    let private = private();
    let name = &handler.signature.ident;
    let arguments = arguments(handler);
    let parameters = &handler.parameters;

    let (generics, marker, bounds) = match parameters.split_last() {
        None => (quote!(__IdempotencyS), quote!(((),)), TokenStream::new()),
        Some((last, parts)) => (
            quote!(__IdempotencyS, __IdempotencyM),
            quote!((__IdempotencyM, #(#parts,)* #last,)),
            quote! {
                where
                    __IdempotencyS: ::core::marker::Send + ::core::marker::Sync + 'static,
                    #(#parts: #private::FromRequestParts<__IdempotencyS> + ::core::marker::Send,)*
                    #last: #private::FromRequest<__IdempotencyS, __IdempotencyM> + ::core::marker::Send,
            },
        ),
    };

    // The compiler finds here that the future is not `Send`, or its output no answer.
    let output = match &handler.signature.output {
        ReturnType::Type(_, output) => output.span(),
        ReturnType::Default => name.span(),
    };
    let span = Span::call_site().located_at(output);
    let function = quote_spanned! {span=>
        move |#(#arguments: #parameters),*| {
            __idempotency_entry.mark();
            #name(#(#arguments),*)
        }
    };

    quote! {
        impl<#generics> #private::Handler<#marker, __IdempotencyS> for #hidden
        #bounds
        {
            type Future = #private::HandlerFuture<#private::BoxedFuture>;

            fn call(
                self,
                __idempotency_request: #private::Request,
                __idempotency_state: __IdempotencyS,
            ) -> Self::Future {
                #private::run(
                    &self.seat,
                    Self::__NAME,
                    &Self::__policy(),
                    __idempotency_request,
                    move |__idempotency_request, __idempotency_entry| {
                        #private::Handler::<#marker, __IdempotencyS>::call(
                            #function,
                            __idempotency_request,
                            __idempotency_state,
                        )
                    },
                )
            }
        }
    }
}

/// An exempt handler has no conflicts to handle: one check per parameter, so that the error points at it.
fn exempt_checks(policy: &Policy, handler: &HandlerFn) -> TokenStream {
    if let Policy::Key(_) = policy {
        return TokenStream::new();
    }
    let private = private();
    handler
        .parameters
        .iter()
        .map(|parameter| {
            let span = Span::mixed_site().located_at(parameter.span());
            quote_spanned! {span=>
                const _: () = {
                    use #private::NoNeeds as _;
                    ::core::assert!(
                        !#private::NeedsOf::<#parameter>::NEEDS.is_manual(),
                        "an exempt handler has no conflicts to handle: use `#[idempotency_key]`, or remove this parameter"
                    );
                };
            }
        })
        .collect()
}

/// Names for the parameters, whose patterns stay with the function. No user's constant has such a name, so that they bind.
fn arguments(handler: &HandlerFn) -> Vec<Ident> {
    (0..handler.parameters.len())
        .map(|index| format_ident!("__idempotency_{index}", span = Span::mixed_site()))
        .collect()
}

/// Where everything that the expansion uses is found.
fn private() -> TokenStream {
    quote!(::idempotency_axum::__private)
}
