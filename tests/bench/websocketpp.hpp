// A configuration of websocketpp without logs and locks (one thread), for its client and its server.
#pragma once

#include <websocketpp/concurrency/none.hpp>
#include <websocketpp/logger/basic.hpp>
#include <websocketpp/transport/asio/endpoint.hpp>

template <class Base>
struct OneThread : Base {
    using concurrency_type = websocketpp::concurrency::none;
    using elog_type = websocketpp::log::basic<concurrency_type, websocketpp::log::elevel>;
    using alog_type = websocketpp::log::basic<concurrency_type, websocketpp::log::alevel>;
    static const websocketpp::log::level elog_level = websocketpp::log::elevel::none;
    static const websocketpp::log::level alog_level = websocketpp::log::alevel::none;
    struct transport_config : Base::transport_config {
        using concurrency_type = OneThread::concurrency_type;
        using elog_type = OneThread::elog_type;
        using alog_type = OneThread::alog_type;
        static const bool enable_multithreading = false;
    };
    using transport_type = websocketpp::transport::asio::endpoint<transport_config>;
};
