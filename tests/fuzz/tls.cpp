// The same as server.cpp, but the server listens with TLS, and the peers are clients of TLS: they also update keys,
// renegotiate, send tiny and broken records, hold back parts of records, and end early.
#define WSCHAT_OPENSSL 1
#define OPENSSL_SUPPRESS_DEPRECATED  // RAND_set_rand_method()

#include "server.cpp"
