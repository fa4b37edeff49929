package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/thaw-project/thaw/kind"
)

// listenUnix listens on path with mode 0600. The caller holds the run directory's
// lock, so a socket that is there belongs to a dead server, unless somebody who knows
// nothing of the lock answers on it.
func listenUnix(path string) (net.Listener, error) {
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, kind.Errorf(kind.InUse, "%s is not a socket: remove it, or choose another --run", path)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil || errors.Is(err, unix.EAGAIN) { // a full backlog
		if err == nil {
			c.Close()
		}
		return nil, kind.Errorf(kind.InUse, "socket %s is in use by another program: stop it, or choose another --run", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove stale socket: %w", err)
	}
	// umask is per process; sockets are made one after another at start, before
	// anything else creates files.
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// service is something that serves a listener until it is stopped.
type service struct {
	name  string
	serve func() error
	stop  func()
}

// services runs several and stops all when one fails.
type services struct {
	list []service
	wg   sync.WaitGroup
	errs chan error
}

func (s *services) addGRPC(name string, l net.Listener, server *grpc.Server) {
	s.list = append(s.list, service{
		name:  name,
		serve: func() error { return server.Serve(l) },
		stop: func() {
			// Streams (Hold) end only when their client goes, so a graceful stop
			// is bounded.
			done := make(chan struct{})
			go func() { server.GracefulStop(); close(done) }()
			select {
			case <-done:
			case <-time.After(2 * time.Second):
				server.Stop()
				<-done
			}
		},
	})
}

func (s *services) addHTTP(name string, l net.Listener, handler http.Handler) {
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	s.list = append(s.list, service{
		name: name,
		serve: func() error {
			if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		},
		stop: func() { server.Close() },
	})
}

func (s *services) start() {
	s.errs = make(chan error, len(s.list))
	for _, one := range s.list {
		s.wg.Add(1)
		go func() {
			defer s.wg.Done()
			if err := one.serve(); err != nil {
				s.errs <- fmt.Errorf("serve %s: %w", one.name, err)
			}
		}()
	}
}

// wait returns when ctx ends (nil), a service fails, or the presentation is gone:
// somebody unmounted it, and only a new server mounts it again.
func (s *services) wait(ctx context.Context, gone <-chan struct{}) error {
	select {
	case <-ctx.Done():
		return nil
	case <-gone:
		return kind.Errorf(kind.Unavailable, "the presentation was unmounted or aborted from outside: start the server again")
	case err := <-s.errs:
		return err
	}
}

func (s *services) stop() {
	for _, one := range s.list {
		one.stop()
	}
	s.wg.Wait()
}

// observability serves /metrics and /healthz.
func observability(registry *prometheus.Registry, health func(context.Context) error) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
		defer cancel()
		if err := health(ctx); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}

// listenTCP listens at the address that the configuration's key says.
func listenTCP(key, address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, kind.Errorf(kind.InUse, "%s %s is in use by another program: choose another", key, address)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s %s: %w", key, address, err)
	}
	return l, nil
}
