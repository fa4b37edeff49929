package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/daemon"
)

func newAttachment() *cobra.Command {
	var where place
	cmd := group("attachment", "See and end what other machines have attached of this store", attachmentList(&where), attachmentDelete(&where))
	where.register(cmd)
	return cmd
}

// callNode runs f with a client of the server's calls for nodes.
func (p *place) callNode(cmd *cobra.Command, f func(attacherv1.NodeClient) error) error {
	conn, err := p.part(cmd.Context(), daemon.RoleStore)
	if err != nil {
		return err
	}
	defer conn.Close()
	return f(attacherv1.NewNodeClient(conn))
}

func attachmentList(where *place) *cobra.Command {
	var out output
	var node string
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List which node has which block attached",
		Example: "  thaw attachment list --node node-7",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return where.callNode(cmd, func(c attacherv1.NodeClient) error {
				list, err := c.ListAttachments(cmd.Context(), &attacherv1.ListAttachmentsRequest{Node: node})
				if err != nil {
					return err
				}
				return out.print(cmd.OutOrStdout(), list.GetAttachments(), func(w *tabwriter.Writer) {
					row(w, "NODE", "BLOCK", "LAYER", "TRANSPORT", "NSID", "CREATED")
					for _, a := range list.GetAttachments() {
						row(w, a.GetNode(), a.GetBlock(), a.GetWritableId(), a.GetTransport(), a.GetNsid(), ageText(a.GetCreatedUnixNanos()))
					}
				})
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "only those of this node")
	out.register(cmd)
	return cmd
}

func attachmentDelete(where *place) *cobra.Command {
	var node string
	var all, layers bool
	cmd := &cobra.Command{
		Use:   "delete [BLOCK...]",
		Short: "Take blocks away from a node that is gone for good",
		Long: `Take blocks away from a node that is gone for good, so that its images can be removed.
A node that is alive attaches again what its containers use; until then they read
errors. Writable layers, and what containers wrote to them, go only with --layers.`,
		Example: `  thaw attachment delete --node node-7 --all
  thaw attachment delete --node node-7 soldier-9e762855-72b8-505a-b08e-efa7cafc8d29`,
		RunE: func(cmd *cobra.Command, blocks []string) error {
			if node == "" || all == (len(blocks) > 0) || layers && !all {
				return usage{fmt.Errorf("--node, and blocks or --all, which --layers goes with, are required: see '%s --help'", cmd.CommandPath())}
			}
			return where.callNode(cmd, func(c attacherv1.NodeClient) error {
				if all {
					list, err := c.ListAttachments(cmd.Context(), &attacherv1.ListAttachmentsRequest{Node: node})
					if err != nil {
						return err
					}
					for _, a := range list.GetAttachments() {
						switch {
						case !a.GetWritable():
							blocks = append(blocks, a.GetBlock())
						case layers:
							if _, err := c.DeleteWritable(cmd.Context(), &attacherv1.DeleteWritableRequest{Node: node, Id: a.GetWritableId()}); err != nil {
								return err
							}
							fmt.Fprintln(cmd.OutOrStdout(), a.GetWritableId())
						}
					}
				}
				for _, block := range blocks {
					if _, err := c.DetachBlock(cmd.Context(), &attacherv1.DetachBlockRequest{Node: node, Block: block}); err != nil {
						return err
					}
					fmt.Fprintln(cmd.OutOrStdout(), block)
				}
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&node, "node", "", "name of the node")
	cmd.Flags().BoolVar(&all, "all", false, "everything the node has attached")
	cmd.Flags().BoolVar(&layers, "layers", false, "with --all: also delete the node's writable layers and what is in them")
	return cmd
}
