package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/attacher/rpc"
	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/image/convert/remote"
	"github.com/thaw-project/thaw/node/present/pcie"
	"github.com/thaw-project/thaw/node/present/transient"
)

// storeFlags say which store a conversion writes to.
type storeFlags struct {
	attacher, card, certificate, key, ca, transport string
}

func (s *storeFlags) register(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.attacher, "attacher", "", "host:port of the attacher of a store on another machine")
	f.StringVar(&s.card, "card", "", "socket or host:port of the attacher of the card that is plugged into this machine")
	f.StringVar(&s.certificate, "certificate", "", "PEM file: this machine's certificate, for --attacher and --card")
	f.StringVar(&s.key, "key", "", "PEM file: its key")
	f.StringVar(&s.ca, "ca", "", "PEM file: who signed the certificates of the others")
	f.StringVar(&s.transport, "transport", "", "how the store exports to the card: nvme-tcp, nvme-rdma or rbd (default the store's choice)")
}

// over lays the flags over the configuration.
func (s *storeFlags) over(c daemon.ConvertConfig) (daemon.ConvertConfig, error) {
	for _, p := range []struct {
		flag, address string
		peer          *daemon.PeerConfig
	}{{"--attacher", s.attacher, &c.Attacher}, {"--card", s.card, &c.Card}} {
		if p.address != "" {
			*p.peer = daemon.PeerConfig{Address: p.address, Certificate: s.certificate, Key: s.key, CA: s.ca}
			if err := p.peer.Check(p.flag); err != nil {
				return c, usage{err}
			}
		}
	}
	if s.transport != "" {
		c.Transport = s.transport
	}
	if c.Card.Address != "" && c.Attacher.Address == "" {
		return c, usage{errors.New("--card is for a store that --attacher names: a store of this machine needs no card")}
	}
	return c, nil
}

// client connects to the store; done ends what it began and must be called.
func (s *storeFlags) client(cmd *cobra.Command, where *place) (client attacherv1.AttacherClient, done func() error, err error) {
	config, err := where.load()
	if err != nil {
		return nil, nil, err
	}
	c, err := s.over(config.Convert)
	if err != nil {
		return nil, nil, err
	}
	if c.Attacher.Address == "" {
		local, closeLocal, err := where.attacherClient(cmd.Context())
		return local, func() error { closeLocal(); return nil }, err
	}
	// Apart from done, which an error's return clears.
	var closers []func() error
	closeAll := func() error {
		var errs []error
		for i := len(closers) - 1; i >= 0; i-- {
			errs = append(errs, closers[i]())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, closeAll())
		}
	}()
	o := remote.Options{}
	if c.Card.Address == "" {
		// Before anything is open: it executes this program again.
		dir, err := transient.Isolate()
		if err != nil {
			return nil, nil, err
		}
		exe, err := os.Executable()
		if err != nil {
			return nil, nil, fmt.Errorf("find this program: %w", err)
		}
		files, err := transient.Start(dir, []string{exe, "image", "disks"})
		if err != nil {
			return nil, nil, err
		}
		closers = append(closers, files.Close)
		o.Disks = remote.Files{Client: files}
	} else {
		finder, err := pcie.New(pcie.Options{Functions: config.PCIe.Functions})
		if err != nil {
			return nil, nil, err
		}
		closers = append(closers, finder.Close)
		conn, err := dialPeer(cmd.Context(), c.Card)
		if err != nil {
			return nil, nil, err
		}
		card := &remote.Card{Card: attacherv1.NewCardClient(conn), Finder: finder, By: c.Transport}
		closers = append(closers, card.Close, conn.Close)
		o.Disks = card
	}
	conn, err := dialPeer(cmd.Context(), c.Attacher)
	if err != nil {
		return nil, nil, err
	}
	closers = append(closers, conn.Close)
	if c.Attacher.Local() {
		o.Node = config.NodeName
	}
	o.Attacher = attacherv1.NewAttacherClient(conn)
	return remote.New(o), closeAll, nil
}

// dialPeer connects to a part that may be on another machine.
func dialPeer(ctx context.Context, p daemon.PeerConfig) (*grpc.ClientConn, error) {
	if p.Local() {
		return dial(ctx, p.Address, rpc.DialOptions()...)
	}
	return rpc.DialTLS(p.Address, p.Files())
}

// imageDisks serves what a conversion on another machine than the store writes to.
func imageDisks() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use: "disks", Short: "Serve the disks of a conversion (started by 'thaw image convert')", Hidden: true, Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if dir == "" {
				return usage{fmt.Errorf("--dir is required: 'thaw image convert' starts this by itself")}
			}
			socket := os.NewFile(3, "disks")
			conn, err := net.FileConn(socket)
			if err != nil {
				return usage{fmt.Errorf("descriptor 3 is no socket: 'thaw image convert' starts this by itself: %w", err)}
			}
			socket.Close()
			defer conn.Close()
			stop := context.AfterFunc(cmd.Context(), func() { conn.Close() })
			defer stop()
			log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
			err = transient.Serve(cmd.Context(), dir, conn, log)
			if cmd.Context().Err() != nil {
				return nil
			}
			return err
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "empty directory in a mount namespace of its own")
	return cmd
}
