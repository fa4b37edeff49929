package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/node/imagemgmt"
	"github.com/thaw-project/thaw/node/imagemgmt/client"
	"github.com/thaw-project/thaw/node/present"
	"github.com/thaw-project/thaw/node/present/pcie"
)

// commandUser is who uses blocks that a person attached.
const commandUser = "thaw-block"

func newBlock() *cobra.Command {
	var where place
	cmd := group("block", "See and change which blocks are disks on this machine", blockList(&where), blockAttach(&where), blockDetach(&where))
	where.register(cmd)
	return cmd
}

// callImages runs f with image-mgmt: that of this machine, or where the configuration of the
// snapshotter says it is.
func (p *place) callImages(cmd *cobra.Command, f func(imagemgmt.Service) error) error {
	config, err := p.load()
	if err != nil {
		return err
	}
	connect := func() (*grpc.ClientConn, error) { return p.part(cmd.Context(), daemon.RoleImages) }
	if peer := config.Snapshotter.Images; peer.Address != "" {
		connect = func() (*grpc.ClientConn, error) { return dialPeer(cmd.Context(), peer) }
	}
	conn, err := connect()
	if err != nil {
		return err
	}
	defer conn.Close()
	finder, err := pcie.New(pcie.Options{Functions: config.PCIe.Functions})
	if err != nil {
		return err
	}
	defer finder.Close()
	return f(client.New(conn, client.Options{Finder: finder}))
}

// diskPlace is how a person finds a disk.
func diskPlace(d present.Disk) string {
	if d.Path == "" && d.NVMe != nil {
		return "function " + d.NVMe.Function
	}
	return dash(d.Path)
}

func blockList(where *place) *cobra.Command {
	return listing("List the blocks that are attached, and who uses them", "  thaw block list --json", func(cmd *cobra.Command, out *output) error {
		return where.callImages(cmd, func(s imagemgmt.Service) error {
			list, err := s.List(cmd.Context())
			if err != nil {
				return err
			}
			return out.print(cmd.OutOrStdout(), append([]imagemgmt.Attachment{}, list...), func(w *tabwriter.Writer) {
				row(w, "BLOCK", "TARGET", "SIZE", "DISK", "USERS")
				for _, a := range list {
					row(w, a.Block, dash(a.Disk.Source.Target), bytesText(a.Disk.SizeBytes), diskPlace(a.Disk), strings.Join(a.Users, " "))
				}
			})
		})
	})
}

func blockAttach(where *place) *cobra.Command {
	var out output
	var target string
	cmd := &cobra.Command{
		Use: "attach BLOCK", Short: "Make a block of an image a disk of this machine, to look at it", Args: exactArgs(1),
		Example: "  thaw block attach --target store-1 soldier-9e762855-72b8-505a-b08e-efa7cafc8d29",
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.callImages(cmd, func(s imagemgmt.Service) error {
				d, err := s.Attach(cmd.Context(), imagemgmt.Block{Target: target, Name: a[0]}, commandUser)
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), d, func(w *tabwriter.Writer) { row(w, diskPlace(d)) })
			})
		},
	}
	cmd.Flags().StringVar(&target, "target", "", "the store that has it (default this machine's)")
	out.register(cmd)
	return cmd
}

func blockDetach(where *place) *cobra.Command {
	return &cobra.Command{
		Use: "detach BLOCK", Short: "End what 'thaw block attach' began", Args: exactArgs(1),
		Example: "  thaw block detach soldier-9e762855-72b8-505a-b08e-efa7cafc8d29",
		RunE: func(cmd *cobra.Command, a []string) error {
			return where.callImages(cmd, func(s imagemgmt.Service) error {
				if err := s.Detach(cmd.Context(), a[0], commandUser); err != nil {
					return err
				}
				fmt.Fprintln(cmd.OutOrStdout(), a[0])
				return nil
			})
		},
	}
}
